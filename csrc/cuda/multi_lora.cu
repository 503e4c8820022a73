// Frozen linear and adapters of many in one launch: y_m = W x_m + bias + scale_s B_s (A_s x_m).
//
// The first blocks are producers: each takes four rows of A of one token at a time, all its threads
// over K, and writes scale_s A_s x_m to s; then it raises the flag and ends. The others are consumers
// of some rows of W: four warps stream them against all tokens of the tile, and meanwhile two more
// look up the tokens' slots, have the L2 fetch their rows of B, wait for the flag and multiply B by s.
// That is one more summand beside those of the four warps, so that nobody waits at the end but for
// the slowest. Ranks are read on the device, and each token costs its own.
//
// The flag counts producers that are done. The last warp that has seen it complete resets it, for the
// next launch in the stream or the next replay of a graph. No deadlock: a producer waits for nobody,
// and GPUs start the blocks of a grid in the order of blockIdx, on which CUB's scans rely as well; so
// when a consumer runs, all producers run or have run, however few blocks fit on the GPU.
// Bytes: W once, A and B of each token out of memory or the L2, x a block. Sums have one order.
#include <cmath>

#include "checks.h"
#include "cuda/multi_lora_tiles.h"

namespace fusedpeft::cuda {
namespace {

constexpr int kRanks = 4;  // rows of A that a producer takes at a time

// A row of B: the rank in whole steps of 8 (slots.py).
__device__ inline int row_length(int rank) { return (rank + 7) / 8 * 8; }

// The rank of a slot's part, -1 for one that is free or cannot be.
__device__ inline int rank_of(const Args& a, int slot, int part) {
  if (slot < 0 || slot >= a.count) return -1;
  const int rank = a.rank[int64_t(slot) * a.parts + part];
  return rank <= a.max_rank ? rank : -1;
}

template <class T>
__device__ inline void load8(const T* p, bool aligned, float (&v)[8]) {
  if (aligned) {
    const Vec<T, 8> all = load<8>(p);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(all.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
  }
}

// Four rows of A, from `first` on, against one token.
struct Unit {
  int token, part, slot, rank, first;
};
__device__ inline Unit find_unit(const Args& a, int64_t index) {
  // Higher ranks come last: what no adapter has is at the end, and every block gets as much.
  const int pairs = a.m * a.parts, pair = int(index % pairs);
  Unit unit = {pair / a.parts, pair % a.parts, 0, -1, int(index / pairs) * kRanks};
  if (unit.first >= a.max_rank) return unit;
  unit.slot = a.slots[unit.token];
  unit.rank = rank_of(a, unit.slot, unit.part);
  return unit;
}

template <class T, class P>
__device__ void produce(const Args& a, float* partial) {  // partial [kThreads / kWarp][kRanks]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Unit next = find_unit(a, blockIdx.x);
#pragma unroll 1
  for (int64_t index = blockIdx.x; next.first < a.max_rank;) {
    const Unit unit = next;
    next = find_unit(a, index += a.producers);
    if (unit.first >= row_length(unit.rank)) continue;
    const T* x = static_cast<const T*>(a.x) + unit.token * a.sx;
    const P* rows[kRanks];
#pragma unroll
    for (int i = 0; i < kRanks; ++i)
      rows[i] = static_cast<const P*>(a.a) + unit.slot * a.a_slot +
                (int64_t(unit.part) * a.max_rank + min(unit.first + i, unit.rank - 1)) * a.a_row;
    float sums[kRanks] = {};
    int k = threadIdx.x * 8;
    if (a.aligned)
#pragma unroll 2
      for (; k < a.k; k += kThreads * 8) {
        const Vec<T, 8> xs = load<8>(x + k);
        Vec<P, 8> as[kRanks];
#pragma unroll
        for (int i = 0; i < kRanks; ++i) as[i] = load<8>(rows[i] + k);
#pragma unroll
        for (int e = 0; e < 8; ++e)
#pragma unroll
          for (int i = 0; i < kRanks; ++i) sums[i] += to_float(xs.v[e]) * to_float(as[i].v[e]);
      }
    else
#pragma unroll 1
      for (k = threadIdx.x; k < a.k; k += kThreads)
#pragma unroll
        for (int i = 0; i < kRanks; ++i) sums[i] += to_float(x[k]) * to_float(rows[i][k]);
    const float sum = warp_sums(sums);
    if (lane % (kWarp / kRanks) == 0) partial[warp * kRanks + lane / (kWarp / kRanks)] = sum;
    __syncthreads();
    if (threadIdx.x < kRanks) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kThreads / kWarp; ++i) total += partial[i * kRanks + threadIdx.x];
      const int at = unit.first + threadIdx.x;
      total *= a.scale[int64_t(unit.slot) * a.parts + unit.part];
      // Zeros to the end of a row of B, whose own zeros would not cover a NaN.
      a.s[(int64_t(unit.token) * a.parts + unit.part) * a.max_rank + at] = at < unit.rank ? total : 0.0f;
    }
    __syncthreads();
  }
  __syncthreads();
  if (threadIdx.x == 0) add_release(&a.flags[0], 1);
}

// plane[token][row] = B s for the tile, by the two warps behind the streaming ones. lengths[token]:
// of its row of B, 0 for no adapter, -1 where there is none to find.
template <class P, int kRows, int kTokens>
__device__ void add_adapters(const Args& a, const Place& place, float* plane, int64_t* starts,
                             int* lengths) {
  constexpr int kStride = kPlaneStride<kRows>, kMine = kTokens / kAdapter;
  constexpr int kAtOnce = kWarp / kRows, kBatch = kMine / kAtOnce < 4 ? kMine / kAtOnce : 4;
  static_assert(kMine <= kWarp && kMine % (kAtOnce * kBatch) == 0);
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / kWarp - kStream;
  const auto token_of = [&](int i) { return i * kAdapter + mine; };  // this warp's i-th
  const P* b = static_cast<const P*>(a.b);
  if (lane < kMine) {
    const int token = token_of(lane);
    int length = 0;
    int64_t start = 0;
    const int slot = place.token + token < a.m ? a.slots[place.token + token] : -1;
    if (slot != -1) {
      length = row_length(rank_of(a, slot, place.part));
      for (int part = 0; part < a.parts; ++part)
        if (rank_of(a, slot, part) < 0) length = -1;
      start = slot * a.b_slot + (place.row - place.local) * a.max_rank + place.local * length;
      for (int i = 0; i < place.rows * length; i += 128 / int(sizeof(P))) prefetch(b + start + i);
    }
    lengths[token] = length, starts[token] = start;
  }
  if (lane == 0) {
    wait_for(&a.flags[0], a.producers);
    const unsigned all = (gridDim.x - a.producers) * kAdapter;
    if (atomicAdd(&a.flags[1], 1u) == all - 1) a.flags[0] = 0, a.flags[1] = 0;
  }
  __syncwarp();

  const int row = lane % kRows, from = min(row, place.rows - 1);
#pragma unroll 1
  for (int i0 = lane / kRows; i0 < kMine; i0 += kAtOnce * kBatch) {
    int length[kBatch], most = 0;
    const P* at[kBatch];
    const float* s[kBatch];
    float sums[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = token_of(i0 + i * kAtOnce);
      length[i] = lengths[token];
      most = max(most, length[i]);
      at[i] = b + starts[token] + int64_t(from) * length[i];
      s[i] = a.s + (int64_t(place.token + token) * a.parts + place.part) * a.max_rank;
    }
#pragma unroll 1
    for (int r = 0; r < most; r += 8)
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (r < length[i]) {
          float bs[8];
          load8(at[i] + r, a.aligned, bs);
#pragma unroll
          for (int e = 0; e < 8; ++e) sums[i] += bs[e] * s[i][r + e];
        }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) plane[token_of(i0 + i * kAtOnce) * kStride + row] = sums[i];
  }
}

template <class Tile>
constexpr int kPlane = Tile::kTokens * kPlaneStride<Tile::kRows>;
template <class Tile>
constexpr int kSharedBytes = (kStream + 1) * kPlane<Tile> * 4 + Tile::kTokens * 12;

template <class T, class Tile>
__device__ void multi_lora_block(const Args& a) {
  constexpr int kRows = Tile::kRows, kTokens = Tile::kTokens;
  FP_DYNAMIC_SHARED(float, planes);
  const bool same = sizeof(T) == 4 || a.adapter_dtype != kFloat32;
  if (int(blockIdx.x) < a.producers) {
    if (same) return produce<T, T>(a, planes);
    return produce<T, float>(a, planes);
  }

  const int64_t index = blockIdx.x - a.producers;
  Place place = {0, 0, 0, 0, int(index % a.token_tiles) * kTokens};
  int64_t tile = index / a.token_tiles;
  while (tile >= (a.sizes[place.part] + kRows - 1) / kRows) {
    tile -= (a.sizes[place.part] + kRows - 1) / kRows;
    place.row += a.sizes[place.part++];
  }
  place.local = tile * kRows;
  place.row += place.local;
  place.rows = int(min(int64_t(kRows), a.sizes[place.part] - place.local));

  float* sums = planes + kStream * kPlane<Tile>;
  int64_t* starts = reinterpret_cast<int64_t*>(sums + kPlane<Tile>);
  int* lengths = reinterpret_cast<int*>(starts + kTokens);
  if (threadIdx.x < kStream * kWarp) {
    Tile::run(a, place, planes);
  } else if (same) {
    add_adapters<T, kRows, kTokens>(a, place, sums, starts, lengths);
  } else {
    add_adapters<float, kRows, kTokens>(a, place, sums, starts, lengths);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) {
    const int row = i % kRows, token = i / kRows;
    if (row >= place.rows || place.token + token >= a.m) continue;
    float sum = a.bias ? to_float(static_cast<const T*>(a.bias)[place.row + row]) : 0.0f;
#pragma unroll
    for (int p = 0; p <= kStream; ++p)
      sum += planes[p * kPlane<Tile> + token * kPlaneStride<kRows> + row];
    if (lengths[token] < 0) sum = NAN;
    store(sum, static_cast<T*>(a.y) + (place.token + token) * a.n + place.row + row);
  }
}

// kBlocks on a multiprocessor: so many that 4096 rows of W and the producers all run at once on 132.
template <class T, class Tile, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) multi_lora_mma_kernel(Args a) {
  multi_lora_block<T, Tile>(a);
}
template <class T>
__global__ void __launch_bounds__(kThreads, 2) multi_lora_fma_kernel(Args a) {
  multi_lora_block<T, FmaTile<T>>(a);
}

bool whole(const void* p, int64_t elements, std::size_t size) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && elements * size % 16 == 0;
}

template <class Tile>
dim3 grid_of(Args& a) {
  a.token_tiles = (a.m + Tile::kTokens - 1) / Tile::kTokens;
  int64_t tiles = 0;
  for (int i = 0; i < a.parts; ++i) tiles += (a.sizes[i] + Tile::kRows - 1) / Tile::kRows;
  return dim3(static_cast<unsigned>(a.producers + tiles * a.token_tiles));
}

template <class T, int kRowTiles, int kGroups, int kSpans, int kBlocks>
void launch_mma(Args& a, cudaStream_t stream) {
  using Tile = MmaTile<T, kRowTiles, kGroups, kSpans>;
  const dim3 grid = grid_of<Tile>(a);
  FP_LAUNCH((multi_lora_mma_kernel<T, Tile, kBlocks>), grid, kThreads, kSharedBytes<Tile>, stream, a);
}

template <class T>
void launch(Args& a, cudaStream_t stream) {
  const std::size_t size = a.adapter_dtype == kFloat32 ? 4 : 2;
  a.aligned = a.k % 8 == 0 && a.max_rank % 8 == 0 && whole(a.x, a.sx, sizeof(T)) &&
              whole(a.w, a.sw, sizeof(T)) && whole(a.a, a.a_slot, size) &&
              whole(a.a, a.a_row, size) && whole(a.b, a.b_slot, size);
  if constexpr (sizeof(T) == 2) {
    if (a.aligned && a.m <= 8) return launch_mma<T, 1, 1, 2, 3>(a, stream);
    if (a.aligned && a.m <= 16) return launch_mma<T, 1, 2, 2, 3>(a, stream);
    if (a.aligned && a.m <= 32) return launch_mma<T, 2, 4, 1, 2>(a, stream);
    if (a.aligned) return launch_mma<T, 2, 8, 1, 2>(a, stream);
  }
  const dim3 grid = grid_of<FmaTile<T>>(a);
  FP_LAUNCH((multi_lora_fma_kernel<T>), grid, kThreads, kSharedBytes<FmaTile<T>>, stream, a);
}

}  // namespace

void multi_lora(const MultiLora& given, void* stream_) {
  Args a{given, 0, 0, false};
  check(a.m >= 0 && a.m <= kMostTokens, "m: expected 0 <= m <= 64, got ", a.m);
  check(a.k >= 0 && a.k <= 1 << 30, "k: expected 0 <= k <= 2^30, got ", a.k);
  check(a.parts >= 1 && a.parts <= kMaxParts, "parts: expected 1 <= parts <= 16, got ", a.parts);
  check(a.max_rank >= 1 && a.max_rank <= 1 << 20, "max_rank: expected 1 <= max_rank <= 2^20, got ",
        a.max_rank);
  check(a.processors >= 1, "processors: expected >= 1, got ", a.processors);
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected a code 0..2, got ", a.dtype);
  check(a.adapter_dtype == a.dtype || a.adapter_dtype == kFloat32,
        "adapter_dtype: expected x's or fp32 (0), got ", a.adapter_dtype, " beside ", a.dtype);
  int64_t rows = 0;
  for (int i = 0; i < a.parts; ++i) rows += a.sizes[i];
  check(rows == a.n && rows <= int64_t{1} << 32, "sizes: expected a sum of n = ", a.n, ", got ", rows);
  if (a.m == 0 || a.n == 0) return;
  const int64_t units = int64_t{a.m} * a.parts * ((a.max_rank + kRanks - 1) / kRanks);
  a.producers = units < a.processors ? int(units) : a.processors;
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (a.dtype == kFloat32) return launch<float>(a, stream);
  if (a.dtype == kBFloat16) return launch<__nv_bfloat16>(a, stream);
  return launch<__half>(a, stream);
}

#ifndef FUSEDPEFT_SIMT
uint64_t capture_id(void* stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check_launch("capture_id", cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}
#endif

}  // namespace fusedpeft::cuda
