// Decode attention over shared prefixes and own keys: flash-decoding with a cascade.
//
// A unit is at most 16 queries against a chunk of keys that all of them see: of a request's own keys
// (its H / HKV * T queries of one key head), or of a prefix (those of as many requests that name its
// slot as fit). Blocks find their unit on the device, from the slots: of the requests with one slot
// each 16 / rows-th leads a unit, the blocks of the others end at once. So the grid depends on sizes
// alone. A prefix comes from memory once; units that share it find it in the L2.
//
// 16-bit rows in whole 16 bytes: the warps take 16 keys each in turn, K and V come by cp.async while
// the other is multiplied, both products on tensor cores. Everything else: a tile of keys in shared
// memory as fp32. Both leave a record a query and chunk: the sums of 2^(s - m) v, m, the sum of
// 2^(s - m), with s = score * scale * log2(e). A second kernel merges them in the order of chunks.
// Bytes: 2 HKV D of each key, and 8 (D + 2) of each query and chunk, out of L2.
#include <cmath>

#include "checks.h"
#include "cuda/prefix_unit.h"

namespace fusedpeft::cuda {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kFmaThreads = 128, kMaxDim = 256;

__device__ inline unsigned pack(float x, float y, __half) {
  const __half2 v = __floats2half2_rn(x, y);
  return reinterpret_cast<const unsigned&>(v);
}
__device__ inline unsigned pack(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const unsigned&>(v);
}

// DP: d rounded up. A warp owns its two tiles, so that only warps meet inside the loop.
template <class T, int DP, int kWarps>
__global__ void __launch_bounds__(kWarps * kWarp, 1) prefix_decode_mma_kernel(Args a) {
  constexpr int kStride = DP + 8, kPieces = DP / 8;  // rows 16 bytes apart: no bank conflicts
  __shared__ Unit unit;
  __shared__ __align__(16) T q[kRows * kStride];
  __shared__ __align__(16) T tiles[kWarps][2][kKeys * kStride];
  __shared__ float best[kWarps][kRows], total[kWarps][kRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4;
  const int head = blockIdx.y / tiles_of(a);
  if (warp == 0) find_unit(a, unit);
  __syncthreads();
  if (unit.count == 0) return;
  for (int i = threadIdx.x; i < kRows * kPieces; i += kWarps * kWarp) {
    const int row = i / kPieces, col = i % kPieces * 8;
    Vec<T, 8> piece = {};
    if (row < unit.count && col < a.d) piece = load<8>(query_of<T>(a, unit, head, row) + col);
    *reinterpret_cast<Vec<T, 8>*>(q + row * kStride + col) = piece;
  }
  __syncthreads();

  T *kt = tiles[warp][0], *vt = tiles[warp][1];
  Place place = {};
  const auto fetch = [&](const Args::Keys& keys, T* tile) {
    const T* base = static_cast<const T*>(keys.data) + head * keys.head;
#pragma unroll 4
    for (int i = lane; i < kKeys * kPieces; i += kWarp) {
      const int row = i / kPieces, col = i % kPieces * 8;
      const int outer = __shfl_sync(~0u, place.outer, row), token = __shfl_sync(~0u, place.token, row);
      const bool there = outer >= 0 && col < a.d;
      cp_async16(tile + row * kStride + col,
                 there ? base + outer * keys.outer + token * keys.token + col : base, there ? 16 : 0);
    }
    cp_async_commit();
  };
  const Args::Keys ks = is_prefix(a) ? a.pk : a.k, vs = is_prefix(a) ? a.pv : a.v;
  int low[2], high[2];
  for (int i = 0; i < 2; ++i) seen_by(a, unit, group + 8 * i, &low[i], &high[i]);
  const float scale = a.scale * kLog2E;
  float acc[DP / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  bool bad = false;
  int key = unit.begin + warp * kKeys;
  place = place_of(a, unit, key + lane % kKeys);
  fetch(ks, kt);
  fetch(vs, vt);
#pragma unroll 1
  for (; key < unit.end; key += kWarps * kKeys) {
    bad |= place.bad;
    cp_async_wait<1>();
    __syncwarp();
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < DP; d += 16) {
      unsigned x[4], k[4];
      ldmatrix(x, q + lane % 16 * kStride + d + lane / 16 * 8);
      ldmatrix(k, kt + (lane / 16 * 8 + lane % 8) * kStride + d + lane / 8 % 2 * 8);
      mma<T>(s[0], x, {k[0], k[1]});
      mma<T>(s[1], x, {k[2], k[3]});
    }
    __syncwarp();
    place = place_of(a, unit, key + kWarps * kKeys + lane % kKeys);
    fetch(ks, kt);

    unsigned weights[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rows group and group + 8
      float top = m[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& v = s[j / 2][2 * i + j % 2];
        const int at = key + j / 2 * 8 + lane % 4 * 2 + j % 2;
        v = at >= low[i] && at < high[i] ? v * scale : -INFINITY;
        top = fmaxf(top, v);
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shift = top == -INFINITY ? 0.0f : top, less = exp2f(m[i] - shift);
      m[i] = top, l[i] *= less;
#pragma unroll
      for (int n = 0; n < DP / 8; ++n) acc[n][2 * i] *= less, acc[n][2 * i + 1] *= less;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float x = exp2f(s[n][2 * i] - shift), y = exp2f(s[n][2 * i + 1] - shift);
        l[i] += x + y;
        weights[2 * n + i] = pack(x, y, T{});
      }
    }
    cp_async_wait<1>();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < DP / 8; n += 2) {
      unsigned v[4];
      ldmatrix<true>(v, vt + lane % 16 * kStride + n * 8 + lane / 16 * 8);
      mma<T>(acc[n], weights, {v[0], v[1]});
      mma<T>(acc[n + 1], weights, {v[2], v[3]});
    }
    __syncwarp();
    fetch(vs, vt);
  }
  cp_async_wait<0>();
  bad = __ballot_sync(~0u, bad) != 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    l[i] += __shfl_xor_sync(~0u, l[i], 1);
    l[i] += __shfl_xor_sync(~0u, l[i], 2);
    if (lane % 4 == 0) best[warp][group + 8 * i] = m[i];
    if (lane % 4 == 0) total[warp][group + 8 * i] = bad ? NAN : l[i];
  }
  __syncthreads();

  float* sums = reinterpret_cast<float*>(tiles[warp][0]);  // [kRows, DP]: as large as the two tiles
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = group + 8 * i;
    float top = best[0][row];
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, best[w][row]);
    const float less = top == -INFINITY ? 0.0f : exp2f(m[i] - top);
#pragma unroll
    for (int n = 0; n < DP / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) sums[row * DP + n * 8 + lane % 4 * 2 + j] = acc[n][2 * i + j] * less;
  }
  __syncthreads();
  for (int row = warp; row < unit.count; row += kWarps) {
    float* record = record_of(a, unit.request[row], head, unit.row[row], blockIdx.x);
    for (int d = lane; d < a.d; d += kWarp) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += reinterpret_cast<float*>(tiles[w][0])[row * DP + d];
      record[d] = sum;
    }
    if (lane == 0) {
      float top = best[0][row], sum = 0.0f;
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, best[w][row]);
      const float shift = top == -INFINITY ? 0.0f : top;
      for (int w = 0; w < kWarps; ++w) sum += total[w][row] * exp2f(best[w][row] - shift);
      record[a.d] = top, record[a.d + 1] = sum;
    }
  }
}

// Any d up to kMaxDim, any alignment.
template <class T>
__global__ void __launch_bounds__(kFmaThreads) prefix_decode_fma_kernel(Args a) {
  __shared__ Unit unit;
  __shared__ float q[kRows][kMaxDim + 1], tile[kKeys][kMaxDim + 1], s[kRows][kKeys + 1];
  __shared__ float best[kRows], less[kRows], total[kRows];
  __shared__ Place places[kKeys];
  const int head = blockIdx.y / tiles_of(a);
  if (threadIdx.x < kWarp) find_unit(a, unit);
  __syncthreads();
  if (unit.count == 0) return;
  for (int i = threadIdx.x; i < unit.count * a.d; i += kFmaThreads)
    q[i / a.d][i % a.d] = to_float(query_of<T>(a, unit, head, i / a.d)[i % a.d]);
  if (threadIdx.x < kRows) best[threadIdx.x] = -INFINITY, total[threadIdx.x] = 0.0f;
  const auto fetch = [&](const Args::Keys& keys) {
    const T* base = static_cast<const T*>(keys.data) + head * keys.head;
    for (int i = threadIdx.x; i < kKeys * a.d; i += kFmaThreads) {
      const Place p = places[i / a.d];
      tile[i / a.d][i % a.d] =
          p.outer < 0 ? 0.0f : to_float(base[p.outer * keys.outer + p.token * keys.token + i % a.d]);
    }
  };
  float acc[kMaxDim / kFmaThreads][kRows] = {};
  bool bad = false;
#pragma unroll 1
  for (int key = unit.begin; key < unit.end; key += kKeys) {
    __syncthreads();
    if (threadIdx.x < kKeys) places[threadIdx.x] = place_of(a, unit, key + threadIdx.x);
    __syncthreads();
    for (int i = 0; i < kKeys; ++i) bad |= places[i].bad;
    fetch(is_prefix(a) ? a.pk : a.k);
    __syncthreads();
    for (int i = threadIdx.x; i < unit.count * kKeys; i += kFmaThreads) {
      const int row = i / kKeys, at = i % kKeys;
      float sum = 0.0f;
      for (int d = 0; d < a.d; ++d) sum += q[row][d] * tile[at][d];
      s[row][at] = sum * a.scale * kLog2E;
    }
    __syncthreads();
    fetch(is_prefix(a) ? a.pv : a.v);
    if (int(threadIdx.x) < unit.count) {
      const int row = threadIdx.x;
      int low, high;
      seen_by(a, unit, row, &low, &high);
      float top = best[row], sum = 0.0f;
      for (int i = 0; i < kKeys; ++i) {
        if (key + i < low || key + i >= high) s[row][i] = -INFINITY;
        top = fmaxf(top, s[row][i]);
      }
      const float shift = top == -INFINITY ? 0.0f : top;
      for (int i = 0; i < kKeys; ++i) sum += s[row][i] = exp2f(s[row][i] - shift);
      less[row] = exp2f(best[row] - shift);
      total[row] = total[row] * less[row] + sum;
      best[row] = top;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kMaxDim / kFmaThreads; ++c) {
      const int d = threadIdx.x + c * kFmaThreads;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= unit.count || d >= a.d) continue;
        float sum = acc[c][row] * less[row];
        for (int i = 0; i < kKeys; ++i) sum += s[row][i] * tile[i][d];
        acc[c][row] = sum;
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row >= unit.count) continue;
    float* record = record_of(a, unit.request[row], head, unit.row[row], blockIdx.x);
#pragma unroll
    for (int c = 0; c < kMaxDim / kFmaThreads; ++c)
      if (int(threadIdx.x) + c * kFmaThreads < a.d) record[threadIdx.x + c * kFmaThreads] = acc[c][row];
    if (threadIdx.x == 0) record[a.d] = best[row], record[a.d + 1] = bad ? NAN : total[row];
  }
}

// A warp a query: the records that its chunks have left, in order.
template <class T>
__global__ void __launch_bounds__(kFmaThreads) prefix_decode_merge_kernel(Args a) {
  const int64_t query = int64_t(blockIdx.x) * (kFmaThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, rows = rows_of(a);
  if (query >= int64_t(a.b) * a.hkv * rows) return;
  const int b = int(query / (int64_t(a.hkv) * rows));
  int first;
  const int prefix = prefix_length(a, b), own = own_length(a, b, &first);
  // Chunks that have keys come first, of either kind.
  const int of_prefix = prefix > 0 ? (prefix - 1) / chunk_size(prefix, a.prefix_splits) + 1 : 0;
  const int of_own = own > 0 ? (own - first - 1) / chunk_size(own - first, a.splits) + 1 : 0;
  const float* records = a.work + query * (a.prefix_splits + a.splits) * (a.d + 2);
  const auto record = [&](int i) {
    return records + int64_t(i < of_prefix ? i : a.prefix_splits + i - of_prefix) * (a.d + 2);
  };
  float top = -INFINITY, total = 0.0f;
  for (int i = 0; i < of_prefix + of_own; ++i) top = fmaxf(top, record(i)[a.d]);
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int i = 0; i < of_prefix + of_own; ++i)
    total += record(i)[a.d + 1] * exp2f(record(i)[a.d] - shift);
  if (prefix < 0 || own < 0) total = NAN;
  for (int d = lane; d < a.d; d += kWarp) {
    float sum = 0.0f;
    for (int i = 0; i < of_prefix + of_own; ++i) sum += record(i)[d] * exp2f(record(i)[a.d] - shift);
    store(total == 0.0f ? 0.0f : sum / total, static_cast<T*>(a.out) + query * a.d + d);
  }
  if (lane == 0) a.lse[query] = total == 0.0f ? -INFINITY : (shift + log2f(total)) * kLn2;
}

bool in_pieces(const Args& a) {
  bool whole = a.d % 8 == 0 && reinterpret_cast<std::uintptr_t>(a.q) % 16 == 0;
  for (const auto& k : {a.k, a.v, a.pk, a.pv})
    whole = whole && reinterpret_cast<std::uintptr_t>(k.data) % 16 == 0 && k.outer % 8 == 0 &&
            k.head % 8 == 0 && k.token % 8 == 0;
  return whole;
}

template <class T>
void launch(const Args& a, cudaStream_t stream) {
  const int rows = a.h / a.hkv * a.t;
  const dim3 grid(a.prefix_splits + a.splits, a.hkv * ((rows + kRows - 1) / kRows), a.b);
  bool fma = true;
  if constexpr (sizeof(T) == 2) {
    fma = !in_pieces(a);
    if (fma) {
    } else if (a.d <= 64) {
      FP_LAUNCH((prefix_decode_mma_kernel<T, 64, 4>), grid, 4 * kWarp, 0, stream, a);
    } else if (a.d <= 128) {
      FP_LAUNCH((prefix_decode_mma_kernel<T, 128, 4>), grid, 4 * kWarp, 0, stream, a);
    } else {
      FP_LAUNCH((prefix_decode_mma_kernel<T, 256, 2>), grid, 2 * kWarp, 0, stream, a);
    }
  }
  if (fma) FP_LAUNCH((prefix_decode_fma_kernel<T>), grid, kFmaThreads, 0, stream, a);
  const int64_t queries = int64_t(a.b) * a.hkv * rows, each = kFmaThreads / kWarp;
  FP_LAUNCH((prefix_decode_merge_kernel<T>), dim3((queries + each - 1) / each), kFmaThreads, 0, stream,
            a);
}

}  // namespace

void prefix_decode(const PrefixDecode& a, void* stream) {
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected a code 0..2, got ", a.dtype);
  check(a.hkv >= 1 && a.h % a.hkv == 0, "hkv: expected a divisor of h = ", a.h, ", got ", a.hkv);
  check(a.d >= 1 && a.d <= kMaxDim, "d: expected 1 <= d <= 256, got ", a.d);
  check(a.b >= 0 && a.b <= 65535, "b: expected 0 <= b <= 65535, got ", a.b);
  check(a.t >= 0 && a.t <= 8, "t: expected 0 <= t <= 8, got ", a.t);
  check(a.h >= 0 && a.h <= 8192, "h: expected 0 <= h <= 8192, got ", a.h);
  check(a.prefix_splits >= 1 && a.splits >= 1, "splits: expected >= 1, got ", a.prefix_splits, ", ",
        a.splits);
  check(!a.table || a.block >= 1, "block: expected >= 1, got ", a.block);
  if (a.b == 0 || a.h == 0 || a.t == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == kFloat32) return launch<float>(a, s);
  if (a.dtype == kBFloat16) return launch<__nv_bfloat16>(a, s);
  return launch<__half>(a, s);
}

}  // namespace fusedpeft::cuda
