// y = residual + scale * (act(norm(x) D^T + c) U^T + e) for a few tokens, each with its own adapter,
// in one launch.
//
// A unit is up to 4 tokens of one slot. The first half of the blocks makes h = act(norm(x) D^T + c),
// some rows of D of a unit at a time; the second half takes some rows of U each, asks for them, waits
// for h and finishes y. Which units there are, and who takes what, each block finds from the slots, so
// that the grid depends on sizes alone.
//
// Each of the second half has a copy of h of its own, in which a number is its own flag: kEmpty until
// it is written, and kEmpty again once it is read. So one trip through the L2 brings h over, no fence
// or counter is needed, and the next launch finds all as this one did. How many numbers come depends
// on the slots and on max_size alone, not on sizes that may change meanwhile.
//
// Nobody waits for a block behind it in the grid, and the whole grid fits the GPU at once (two blocks
// a processor); either is enough to end. Sums have one order for a batch's slots on a GPU; how many
// warps share a row of D depends on how many units there are. Bytes: D and U of each unit, and 3 M d.
#include <cmath>

#include "checks.h"
#include "cuda/adapter_tokens.h"
#include "cuda/workspace.h"

namespace fusedpeft::cuda {
namespace {

constexpr unsigned kEmpty = ~0u;  // a NaN that is never written as h

// Eight elements, those from `count` on as zeros. kWhole: p is at 16 bytes, and count <= 0 or 8.
template <bool kWhole, class T>
__device__ inline Vec<T, kPiece> piece(const T* p, int count) {
  Vec<T, kPiece> v = {};
  if constexpr (kWhole) {
    if (count > 0) v = load<kPiece>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      if (i < count) v.v[i] = p[i];
  }
  return v;
}

__device__ inline float activate(int kind, float v) {
  switch (kind) {
    case 0: return v < 0.0f ? 0.0f : v;
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case 3: return v / (1.0f + expf(-v));
    case 4: return tanhf(v);
    default: return v > 0.0f ? v : 0.01f * v;
  }
}

template <class T>
__device__ inline const T* at(const void* p, int64_t offset) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}

// --- the way down -------------------------------------------------------------------------------

// v[g] summed over the block, in every thread. The next use of `which` needs a barrier in between.
__device__ inline void block_sums(float (&v)[kTokens], Shared& s, int which) {
  constexpr int kLanes = kWarp / kTokens;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float sum = warp_sums(v);
  if (lane % kLanes == 0) s.sums[which][warp][lane / kLanes] = sum;
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kTokens; ++g) {
    v[g] = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) v[g] += s.sums[which][w][g];
  }
}

// Of each token: the mean (0 for RMSNorm) and 1 / sqrt(mean of (x - mean)^2 + eps). Rows far from
// zero need the two passes.
template <bool kWhole, class X>
__device__ void statistics(const Args& a, Shared& s, const X* const (&x)[kTokens], int count,
                           float (&mean)[kTokens], float (&rate)[kTokens]) {
  const int d = int(a.d);
#pragma unroll
  for (int g = 0; g < kTokens; ++g) rate[g] = 0.0f;
#pragma unroll 1
  for (int pass = a.norm == 1 ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
    for (int i = threadIdx.x * kPiece; i < d; i += kThreads * kPiece)
#pragma unroll
      for (int g = 0; g < kTokens; ++g) {
        if (g >= count) continue;
        const Vec<X, kPiece> v = piece<kWhole>(x[g] + i, d - i);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
          const float e = i + j < d ? to_float(v.v[j]) - mean[g] : 0.0f;
          rate[g] += pass ? e * e : e;
        }
      }
    block_sums(rate, s, pass);
#pragma unroll
    for (int g = 0; g < kTokens; ++g) {
      rate[g] /= d;
      if (pass == 0) mean[g] = rate[g], rate[g] = 0.0f;
    }
  }
#pragma unroll
  for (int g = 0; g < kTokens; ++g) rate[g] = 1.0f / sqrtf(rate[g] + a.eps);
}

// The E of a slot that there is, -1 for one that is free or cannot be.
__device__ inline int size_of(const Args& a, int slot) {
  return a.size[slot] <= a.max_size ? a.size[slot] : -1;
}

// Rows [row0, end) of D for unit u, up to a row a warp at a time; of few rows several warps share one.
// With norm(x) = (x - mean) rate w + b a product is rate * sum((x - mean) w D) + sum(b D).
template <bool kWhole, class X, class A>
__device__ void down(const Args& a, Shared& s, int u, int row0, int end) {
  constexpr int kAhead = kWhole ? 8 / sizeof(A) : 1;  // pieces of D asked for at a time
  const int slot = s.slot_of(u), count = s.count[u], size = size_of(a, slot), d = int(a.d);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, most = int(a.max_size);
  int lines = 1;  // rows at a time
  while (lines < end - row0 && lines < kWarps) lines *= 2;
  const int sharers = kWarps / lines, line = warp / sharers;
  const int i0 = (warp % sharers * kWarp + lane) * kPiece, step = sharers * kWarp * kPiece;
  const A* const matrix = at<A>(a.down, slot * a.down_slot);
  const A* const bias = at<A>(a.down_bias, slot * a.down_bias_slot);
  const A* const w = at<A>(a.norm_weight, slot * a.norm_weight_slot);
  const A* const b = at<A>(a.norm_bias, slot * a.norm_bias_slot);
  const X* x[kTokens];
#pragma unroll
  for (int g = 0; g < kTokens; ++g) x[g] = at<X>(a.x, s.token(u, g) * a.sx);

  Vec<A, kPiece> ds[kAhead], next[kAhead];
  const auto fetch = [&](Vec<A, kPiece> (&to)[kAhead], int row, int i) {  // past the end: the last row
    const A* const from = matrix + int64_t(min(row + line, end - 1)) * d;
#pragma unroll
    for (int p = 0; p < kAhead; ++p) to[p] = piece<kWhole>(from + i + p * step, d - i - p * step);
  };
  // What lies beyond the size is zero as h, and few tokens do not wait to know it: the bytes are there.
  const bool read = a.m <= kFew || row0 < size;
  float mean[kTokens] = {}, rate[kTokens] = {1.0f, 1.0f, 1.0f, 1.0f};
  if (read) {
    fetch(ds, row0, i0);
    const auto* const bytes = reinterpret_cast<const char*>(matrix + int64_t(row0) * d);
    const int64_t all = int64_t(min(end, a.m <= kFew ? end : size) - row0) * d * sizeof(A);
    if (end - row0 > lines)
      for (int64_t i = threadIdx.x * 128; i < all; i += kThreads * 128) prefetch(bytes + i);
    if (a.norm) statistics<kWhole>(a, s, x, count, mean, rate);
  }
#pragma unroll 1
  for (int row = row0, which = 0; row < end; row += lines, which ^= 1) {
    const float c = bias ? to_float(bias[min(row + line, most - 1)]) : 0.0f;
    float sums[kTokens] = {}, shift = 0.0f;
#pragma unroll 1
    for (int i = i0; read && i < d; i += kAhead * step) {
      if (i + kAhead * step < d) {
        fetch(next, row, i + kAhead * step);
      } else if (row + lines < end) {
        fetch(next, row + lines, i0);
      }
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
        const int k = i + p * step;
        if (k >= d) continue;
        float f[kPiece];
#pragma unroll
        for (int j = 0; j < kPiece; ++j) f[j] = to_float(ds[p].v[j]);
        if (b) {
          const Vec<A, kPiece> v = piece<kWhole>(b + k, d - k);
#pragma unroll
          for (int j = 0; j < kPiece; ++j) shift += to_float(v.v[j]) * f[j];
        }
        if (w) {
          const Vec<A, kPiece> v = piece<kWhole>(w + k, d - k);
#pragma unroll
          for (int j = 0; j < kPiece; ++j) f[j] *= to_float(v.v[j]);
        }
#pragma unroll
        for (int g = 0; g < kTokens; ++g) {
          if (g >= count) continue;
          const Vec<X, kPiece> v = piece<kWhole>(x[g] + k, d - k);
#pragma unroll
          for (int j = 0; j < kPiece; ++j) sums[g] += (to_float(v.v[j]) - mean[g]) * f[j];
        }
      }
#pragma unroll
      for (int p = 0; p < kAhead; ++p) ds[p] = next[p];
    }
#pragma unroll
    for (int g = 0; g < kTokens; ++g) sums[g] = rate[g] * sums[g] + shift;
    constexpr int kLanes = kWarp / kTokens;
    const float sum = warp_sums(sums) + (warp % sharers == 0 ? c : 0.0f);
    if (lane % kLanes == 0) s.sums[which][warp][lane / kLanes] = sum;
    __syncthreads();
    const int n = min(lines, end - row), copies = s.parts.count;
    for (int i = threadIdx.x; i < n * count * copies; i += kThreads) {
      const int copy = i % copies, r = i / copies % n, g = i / copies / n;
      float h = 0.0f;
      for (int k = 0; k < sharers; ++k) h += s.sums[which][r * sharers + k][g];
      h = row + r < size ? activate(a.activation, h) : 0.0f;
      const unsigned bits = h == h ? reinterpret_cast<const unsigned&>(h) : 0x7FC00000u;
      store_relaxed(s.copy_of(a, u, copy) + g * most + row + r, bits);
    }
  }
}

// --- the way up ---------------------------------------------------------------------------------

// Rows [row0, end) of U for unit u. `h` has room for the unit's.
template <bool kWhole, class X, class A>
__device__ void up(const Args& a, Shared& s, int u, int part, int row0, int end, float* h) {
  constexpr int kBatch = 4;  // rows that a lane has asked for
  const int slot = s.slot_of(u), count = s.count[u], most = int(a.max_size);
  const bool there = slot >= 0 && slot < a.count;
  const int size = there ? size_of(a, slot) : slot == -1 ? 0 : -1, pieces = (size + 7) / kPiece;
  int lanes = kBatch;  // for a row of U: a power of two, as the sum takes
  while (lanes < kWarp && lanes < pieces) lanes *= 2;
  const int rows = kWarp / lanes, lane = threadIdx.x % kWarp, at_lane = lane % lanes;
  const A* const matrix = at<A>(a.up, there ? slot * a.up_slot : 0);
  const A* const bias = at<A>(a.up_bias, there ? slot * a.up_bias_slot : 0);
  const float scale = there ? a.scale[slot] : 0.0f;
  const int stride = pieces * kPiece, span = kBatch * rows, first = row0 + threadIdx.x / kWarp * span;

  Vec<A, kPiece> us[kBatch];
  float base[kTokens], e = 0.0f;
  const auto get = [&](int from, int p) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = from + b * rows + lane / lanes;
      const bool in = row < end && p < pieces;
      us[b] = piece<kWhole>(matrix + (in ? int64_t(row) * stride + p * kPiece : 0), in ? kPiece : 0);
    }
  };
  const auto fetch = [&](int from) {  // the first kBatch lanes of a row's finish one row each
    get(from, at_lane);
    const int row = from + at_lane * rows + lane / lanes;
    const bool mine = at_lane < kBatch && row < end;
    e = mine && size > 0 && bias ? to_float(bias[row]) : 0.0f;
#pragma unroll
    for (int g = 0; g < kTokens; ++g) {
      const X* const r = at<X>(a.residual, s.token(u, g) * a.sr);
      base[g] = mine && r && g < count ? to_float(r[row]) : 0.0f;
    }
  };
  fetch(first);
  if (end - row0 > kWarps * span) {
    const auto* const bytes = reinterpret_cast<const char*>(matrix + int64_t(row0) * stride);
    const int64_t all = int64_t(end - row0) * stride * sizeof(A);
    for (int64_t i = threadIdx.x * 128; i < all; i += kThreads * 128) prefetch(bytes + i);
  }
  if (there) {
    unsigned* const copy = s.copy_of(a, u, part);
    const int all = count * most;
#pragma unroll 1
    for (int i = threadIdx.x; i < all; i += 4 * kThreads) {
      unsigned v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = i + j * kThreads < all ? load_relaxed(copy + i + j * kThreads) : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j * kThreads >= all) continue;
        unsigned* const from = copy + i + j * kThreads;
        while (v[j] == kEmpty) __nanosleep(20), v[j] = load_relaxed(from);
        store_relaxed(from, kEmpty);
        h[i + j * kThreads] = reinterpret_cast<const float&>(v[j]);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int from = first; from < end; from += kWarps * span) {
    float sums[kTokens][kBatch] = {};
#pragma unroll 1
    for (int p = at_lane; p < pieces; p += lanes) {
      if (p != at_lane) get(from, p);  // a row is more than a warp's
#pragma unroll
      for (int g = 0; g < kTokens; ++g) {
        if (g >= count) continue;
        const auto* const hs = reinterpret_cast<const float4*>(h + g * most + p * kPiece);
        const float4 lo = hs[0], hi = hs[1];
        const float x[kPiece] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int j = 0; j < kPiece; ++j) sums[g][b] += x[j] * to_float(us[b].v[j]);
      }
    }
    const int row = from + at_lane * rows + lane / lanes;
#pragma unroll
    for (int g = 0; g < kTokens; ++g) {
      if (g >= count) continue;
      // Lane l of a row's takes row l % kBatch of the batch: half of its sums are handed over, twice.
      const float(&v)[kBatch] = sums[g];
      float half[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float keep = lane & 2 ? v[2 + i] : v[i], give = lane & 2 ? v[i] : v[2 + i];
        half[i] = keep + __shfl_xor_sync(~0u, give, 2);
      }
      const float give = lane & 1 ? half[0] : half[1];
      float sum = (lane & 1 ? half[1] : half[0]) + __shfl_xor_sync(~0u, give, 1);
      for (int bit = 4; bit < lanes; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
      float y = size > 0 ? base[g] + scale * (sum + e) : base[g];
      if (size < 0) y = NAN;
      if (at_lane < kBatch && row < end) store(y, static_cast<X*>(a.y) + s.token(u, g) * a.d + row);
    }
    if (from + kWarps * span < end) fetch(from + kWarps * span);
  }
}

// --- the kernel ---------------------------------------------------------------------------------

template <bool kWhole, class X, class A>
__global__ void __launch_bounds__(kThreads, 2) adapter_decode_kernel(Args a, int producers) {
  __shared__ Shared s;
  FP_DYNAMIC_SHARED(float, h);  // [kTokens, max_size]
  const int consumers = gridDim.x - producers;
  find_units(a, s, producers, consumers);
  const bool produces = int(blockIdx.x) < producers;
  const Split split = produces ? s.slices : s.parts;
  const int from = produces ? blockIdx.x : blockIdx.x - producers;
#pragma unroll 1
  for (int item = from; item < s.units * split.count; item += produces ? producers : consumers) {
    const int u = item % s.units, i = item / s.units, row0 = i * split.rows;
    const int end = min(row0 + split.rows, int(produces ? a.max_size : a.d));
    if (!produces) {
      up<kWhole, X, A>(a, s, u, i, row0, end, h);
    } else if (s.slot_of(u) >= 0 && s.slot_of(u) < a.count) {
      down<kWhole, X, A>(a, s, u, row0, end);
    }
    __syncthreads();
  }
}

template <class T>
bool in_pieces(const void* p, int64_t slot, int64_t row) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && slot * sizeof(T) % 16 == 0 &&
         row * sizeof(T) % 16 == 0;
}

template <class X, class A>
void launch(const Args& a, cudaStream_t stream) {
  const bool whole = a.d % kPiece == 0 && in_pieces<X>(a.x, 0, a.sx) &&
                     in_pieces<A>(a.down, a.down_slot, a.d) && in_pieces<A>(a.up, a.up_slot, 0) &&
                     in_pieces<A>(a.norm_weight, a.norm_weight_slot, 0) &&
                     in_pieces<A>(a.norm_bias, a.norm_bias_slot, 0);
  const int64_t producers = std::min<int64_t>(a.processors, a.m * a.max_size);
  const int64_t consumers = std::min<int64_t>(a.processors, a.m * ((a.d + kLeastPart - 1) / kLeastPart));
  const int64_t items = std::max(consumers, a.m);  // of a consumer, at most
  auto b = a;
  b.work = workspace(items * kTokens * a.max_size, stream, 0xFF);
  const dim3 grid(producers + consumers);
  const std::size_t shared = kTokens * a.max_size * sizeof(float);
  if (whole) {
    FP_LAUNCH((adapter_decode_kernel<true, X, A>), grid, kThreads, shared, stream, b, int(producers));
  } else {
    FP_LAUNCH((adapter_decode_kernel<false, X, A>), grid, kThreads, shared, stream, b, int(producers));
  }
}

}  // namespace

void adapter_decode(const AdapterDecode& a, void* stream) {
  constexpr int64_t kMost = 1 << 20;
  check(a.m >= 0 && a.m <= kMostAdapterTokens, "m: expected 0 <= m <= 256, got ", a.m);
  check(a.d >= 0 && a.d <= kMost, "d: expected 0 <= d <= 2^20, got ", a.d);
  check(a.max_size >= 8 && a.max_size % 8 == 0 && a.max_size <= kMostAdapterSize,
        "max_size: expected a multiple of 8 up to 2048, got ", a.max_size);
  check(a.count >= 0 && a.count <= kMost, "count: expected 0 <= count <= 2^20, got ", a.count);
  check(a.norm >= 0 && a.norm <= 2, "norm: expected a code 0..2, got ", a.norm);
  check(a.activation >= 0 && a.activation <= 5, "activation: expected a code 0..5, got ", a.activation);
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected a code 0..2, got ", a.dtype);
  check(a.adapter_dtype == a.dtype || a.adapter_dtype == kFloat32,
        "adapter_dtype: expected x's or fp32 (0), got ", a.adapter_dtype, " beside ", a.dtype);
  check(a.processors >= 1, "processors: expected >= 1, got ", a.processors);
  if (a.m == 0 || a.d == 0) return;
  const bool same = a.adapter_dtype == a.dtype;
  auto run = launch<float, float>;
  if (a.dtype == kBFloat16) run = same ? launch<__nv_bfloat16, __nv_bfloat16> : launch<__nv_bfloat16, float>;
  if (a.dtype == kFloat16) run = same ? launch<__half, __half> : launch<__half, float>;
  run({a, nullptr}, static_cast<cudaStream_t>(stream));
}

}  // namespace fusedpeft::cuda
