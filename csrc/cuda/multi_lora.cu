// Frozen linear and adapters of many in one launch: y_m = W x_m + bias + scale_s B_s (A_s x_m).
//
// The first blocks are producers: each takes four rows of A of one token at a time, all its threads
// over K, and writes scale_s A_s x_m to s; then it raises the flag and ends. The others are consumers
// of some rows of W: four warps stream them against all tokens of the tile, and meanwhile two more
// look up the tokens' slots, have the L2 fetch their rows of B, wait for the flag and multiply B by s.
// That is one more summand beside those of the four warps, so that nobody waits at the end but for
// the slowest. Ranks are read on the device, and each token costs its own. Where rows are few, K is
// split, and the tokens' adapters are dealt out to the splits: the blocks of the others leave their
// sums in memory and end, those of the first one wait for them, behind a second flag, and finish y.
//
// A flag counts blocks that are done. The last block that has seen them complete resets them, for the
// next launch in the stream or the next replay of a graph. No deadlock: who waits, waits for blocks
// of a lower blockIdx, and GPUs start the blocks of a grid in that order, on which CUB's scans rely
// as well; so these run or have run, however few blocks fit on the GPU.
// Bytes: W once, A and B of each token out of memory or the L2, x a block. Sums have one order.
#include <cmath>

#include "checks.h"
#include "cuda/multi_lora_tiles.h"
#include "cuda/workspace.h"

namespace fusedpeft::cuda {
namespace {

constexpr int kRanks = 4;  // rows of A that a producer takes at a time

// A row of B: the rank in whole steps of 8 (slots.py).
__device__ inline int row_length(int rank) { return (rank + 7) / 8 * 8; }

// The rank of a slot's part, -1 for one that is free or cannot be.
__device__ inline int rank_of(const Args& a, int slot, int part) {
  if (slot < 0 || slot >= a.count) return -1;
  const int rank = a.rank ? a.rank[int64_t(slot) * a.parts + part] : a.max_rank;
  return rank <= a.max_rank ? rank : -1;
}

__device__ inline int slot_of(const Args& a, int token) { return a.slots ? a.slots[token] : 0; }

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
  unit.slot = slot_of(a, unit.token);
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
      total *= a.scale ? a.scale[int64_t(unit.slot) * a.parts + unit.part] : a.one_scale;
      // Zeros to the end of a row of B, whose own zeros would not cover a NaN.
      a.s[(int64_t(unit.token) * a.parts + unit.part) * a.max_rank + at] = at < unit.rank ? total : 0.0f;
    }
    __syncthreads();
  }
  __syncthreads();
  if (threadIdx.x == 0) add_release(&a.flags[0], 1);
}

// plane[token][row] = B s for the tokens of the tile that are this split's, NaN where a token names no
// adapter's slot; by the two warps behind the streaming ones. starts, lengths [token]: its rows of B.
template <class P, int kRows, int kTokens>
__device__ void add_adapters(const Args& a, const Place& place, float* plane, int64_t* starts,
                             int* lengths) {
  constexpr int kStride = kPlaneStride<kRows>, kBatch = 4;
  constexpr int kLaneRows = kRows < kWarp ? kRows : kWarp, kAtOnce = kWarp / kLaneRows;
  static_assert(kTokens <= kAdapter * kWarp);
  const int lane = threadIdx.x % kWarp, stride = kAdapter * a.splits;
  const int first = (threadIdx.x / kWarp - kStream) * a.splits + place.split;
  const int count = (min(kTokens, a.m - place.token) - first + stride - 1) / stride;  // this warp's
  const P* b = static_cast<const P*>(a.b);
  if (lane < count) {
    const int token = first + lane * stride, slot = slot_of(a, place.token + token);
    int length = 0;
    int64_t start = 0;
    if (slot != -1) {
      length = row_length(rank_of(a, slot, place.part));
      for (int part = 0; part < a.parts; ++part)
        if (rank_of(a, slot, part) < 0) length = -1;
      start = slot * a.b_slot + (place.row - place.local) * a.max_rank + place.local * length;
      for (int i = 0; i < place.rows * length; i += 128 / int(sizeof(P))) prefetch(b + start + i);
    }
    lengths[token] = length, starts[token] = start;
  }
  if (count <= 0) return;
  if (lane == 0) wait_for(&a.flags[0], a.producers);
  __syncwarp();

#pragma unroll 1
  for (int row0 = 0; row0 < place.rows; row0 += kLaneRows) {
    const int row = row0 + lane % kLaneRows, from = min(row, place.rows - 1);
#pragma unroll 1
    for (int i0 = lane / kLaneRows; i0 < count; i0 += kAtOnce * kBatch) {
      int length[kBatch], most = 0;
      const P* at[kBatch];
      const float* s[kBatch];
      float sums[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {  // past the end: the last one again
        const int token = first + min(i0 + i * kAtOnce, count - 1) * stride;
        length[i] = lengths[token];
        most = max(most, length[i]);
        at[i] = b + starts[token] + int64_t(from) * max(length[i], 0);
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
      for (int i = 0; i < kBatch; ++i)
        if (i0 + i * kAtOnce < count)
          plane[(first + (i0 + i * kAtOnce) * stride) * kStride + row] = length[i] < 0 ? NAN : sums[i];
    }
  }
}

template <class Tile>
constexpr int kPlane = Tile::kTokens * kPlaneStride<Tile::kRows>;
template <class Tile>
constexpr int kSharedBytes = (Tile::kShares + 1) * kPlane<Tile> * 4 + Tile::kTokens * 12;

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
  Place place = {};
  place.split = a.splits - 1 - int(index / a.tiles);  // the first one comes last
  const int share = (a.k / a.splits + 63) / 64 * 64;
  place.begin = int(min(int64_t(place.split) * share, int64_t(a.k)));
  place.end = place.split == a.splits - 1 ? a.k : min(place.begin + share, a.k);
  int64_t tile = index % a.tiles / a.token_tiles;
  place.token = int(index % a.token_tiles) * kTokens;
  while (tile >= (a.sizes[place.part] + kRows - 1) / kRows) {
    tile -= (a.sizes[place.part] + kRows - 1) / kRows;
    place.row += a.sizes[place.part++];
  }
  place.local = tile * kRows;
  place.row += place.local;
  place.rows = int(min(int64_t(kRows), a.sizes[place.part] - place.local));

  float* sums = planes + Tile::kShares * kPlane<Tile>;
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
  if (place.split == 0) {
    if (threadIdx.x == 0) {
      wait_for(&a.flags[0], a.producers);
      if (a.splits > 1) wait_for(&a.flags[2], unsigned(a.tiles) * (a.splits - 1));
      if (atomicAdd(&a.flags[1], 1u) == unsigned(a.tiles) - 1)
        a.flags[0] = a.flags[1] = a.flags[2] = 0;
    }
    if (a.splits > 1) __syncthreads();
  }
  for (int i = threadIdx.x; i < kRows * kTokens; i += kThreads) {
    const int row = i % kRows, token = i / kRows;
    if (row >= place.rows || place.token + token >= a.m) continue;
    const int64_t at = (place.token + token) * a.n + place.row + row;
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < Tile::kShares; ++p)
      sum += planes[p * kPlane<Tile> + token * kPlaneStride<kRows> + row];
    if (token % a.splits == place.split) sum += sums[token * kPlaneStride<kRows> + row];
    if (place.split > 0) {
      a.sums[(place.split - 1) * a.m * a.n + at] = sum;
      continue;
    }
    for (int split = 1; split < a.splits; ++split) sum += a.sums[(split - 1) * a.m * a.n + at];
    if (a.bias) sum += to_float(static_cast<const T*>(a.bias)[place.row + row]);
    store(sum, static_cast<T*>(a.y) + at);
  }
  if (place.split > 0) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(&a.flags[2], 1);
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
  a.tiles = 0;
  for (int i = 0; i < a.parts; ++i)
    a.tiles += (a.sizes[i] + Tile::kRows - 1) / Tile::kRows * a.token_tiles;
  return dim3(static_cast<unsigned>(a.producers + a.tiles * a.splits));
}

template <class T, int kRowTiles, int kRowGroups, int kGroups, int kSpans, int kBlocks>
void launch_mma(Args& a, cudaStream_t stream) {
  using Tile = MmaTile<T, kRowTiles, kRowGroups, kGroups, kSpans>;
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
    if (a.aligned && a.m <= 8) return launch_mma<T, 1, 1, 1, 3, 3>(a, stream);
    if (a.aligned && a.m <= 16) return launch_mma<T, 1, 1, 2, 2, 3>(a, stream);
    if (a.aligned && a.m <= 32) return launch_mma<T, 1, 2, 4, 2, 2>(a, stream);
    if (a.aligned) return launch_mma<T, 1, 4, 8, 2, 2>(a, stream);
  }
  const dim3 grid = grid_of<FmaTile<T>>(a);
  FP_LAUNCH((multi_lora_fma_kernel<T>), grid, kThreads, kSharedBytes<FmaTile<T>>, stream, a);
}

}  // namespace

void multi_lora(const MultiLora& given, void* stream_) {
  Args a{given, nullptr, 0, 0, 0, false};
  check(a.m >= 0 && a.m <= kMostTokens, "m: expected 0 <= m <= 64, got ", a.m);
  check(a.k >= 0 && a.k <= 1 << 30, "k: expected 0 <= k <= 2^30, got ", a.k);
  check(a.parts >= 1 && a.parts <= kMaxParts, "parts: expected 1 <= parts <= 16, got ", a.parts);
  check(a.max_rank >= 1 && a.max_rank <= 1 << 20, "max_rank: expected 1 <= max_rank <= 2^20, got ",
        a.max_rank);
  check(a.processors >= 1, "processors: expected >= 1, got ", a.processors);
  check(a.splits >= 1 && a.splits <= 16, "splits: expected 1 <= splits <= 16, got ", a.splits);
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected a code 0..2, got ", a.dtype);
  check(a.adapter_dtype == a.dtype || a.adapter_dtype == kFloat32,
        "adapter_dtype: expected x's or fp32 (0), got ", a.adapter_dtype, " beside ", a.dtype);
  int64_t rows = 0;
  for (int i = 0; i < a.parts; ++i) rows += a.sizes[i];
  check(rows == a.n && rows <= int64_t{1} << 30, "sizes: expected a sum of n = ", a.n, ", got ", rows);
  if (a.m == 0 || a.n == 0) return;
  const int64_t units = int64_t{a.m} * a.parts * ((a.max_rank + kRanks - 1) / kRanks);
  a.producers = units < a.processors ? int(units) : a.processors;
  const auto stream = static_cast<cudaStream_t>(stream_);
  a.flags = workspace(kFlags, stream, 0);
  if (a.dtype == kFloat32) return launch<float>(a, stream);
  if (a.dtype == kBFloat16) return launch<__nv_bfloat16>(a, stream);
  return launch<__half>(a, stream);
}

}  // namespace fusedpeft::cuda
