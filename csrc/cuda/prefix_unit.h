// Which queries and which keys a block of prefix_decode.cu has.
//
// The grid is [prefix_splits + splits, hkv * tiles of a request's queries, b]. Blocks x below
// prefix_splits are for prefixes: request z leads a unit if the requests before it with its slot are a
// multiple of how many fit in one; the others have nothing to do.
#pragma once

#include "cuda/device.h"
#include "cuda/prefix_decode.h"

namespace fusedpeft::cuda {
namespace {

using Args = PrefixDecode;
constexpr int kRows = 16, kKeys = 16;  // of a unit; of a tile

struct Unit {
  int request[kRows], row[kRows];  // of each query; rows of a request: head of the group, token
  int count;                       // queries; 0: nothing to do
  int begin, end, length;          // keys; all keys of the request, or of the prefix
};

__device__ inline bool is_prefix(const Args& a) { return int(blockIdx.x) < a.prefix_splits; }
__device__ inline int rows_of(const Args& a) { return a.h / a.hkv * a.t; }
__device__ inline int tiles_of(const Args& a) { return (rows_of(a) + kRows - 1) / kRows; }

// Keys of request b's prefix, or -1 where there is no such slot.
__device__ inline int prefix_length(const Args& a, int b) {
  const int slot = a.slots[b];
  if (slot == -1) return 0;
  const int keys = slot >= 0 && slot < a.slot_count ? a.prefix_length[slot] : -1;
  return keys <= a.max_prefix ? keys : -1;
}
// Its own keys, or -1; *first: the first that its first query sees.
__device__ inline int own_length(const Args& a, int b, int* first) {
  const int keys = a.lengths ? a.lengths[b] : a.s;
  *first = a.window > 0 ? max(0, keys - a.t + 1 - a.window) : 0;
  return keys >= 0 && keys <= a.s ? keys : -1;
}
// Chunk i of `splits`: whole tiles, so that only the last is ragged.
__device__ inline int chunk_size(int keys, int splits) {
  return ((keys + splits - 1) / splits + 63) / 64 * 64;
}

__device__ inline float* record_of(const Args& a, int b, int head, int row, int split) {
  const int64_t query = (int64_t(b) * a.hkv + head) * rows_of(a) + row;
  return a.work + (query * (a.prefix_splits + a.splits) + split) * (a.d + 2);
}

// In one warp; the block meets afterwards.
__device__ inline void find_unit(const Args& a, Unit& unit) {
  const int lane = threadIdx.x % kWarp, b = blockIdx.z, rows = rows_of(a);
  const int together = rows < kRows ? kRows / rows : 1, row0 = blockIdx.y % tiles_of(a) * kRows;
  int first = 0, members = 1, split = blockIdx.x, splits = a.prefix_splits;
  const int length = is_prefix(a) ? prefix_length(a, b) : own_length(a, b, &first);
  if (!is_prefix(a)) split -= a.prefix_splits, splits = a.splits;
  const int size = length > 0 ? chunk_size(length - first, splits) : 0;
  const int64_t begin = first + int64_t(split) * size;
  if (lane < kRows) unit.request[lane] = b, unit.row[lane] = 0;
  __syncwarp();
  if (length <= 0 || begin >= length) {
    members = 0;
  } else if (is_prefix(a)) {
    int before = 0;
    members = 0;
    for (int j0 = 0; j0 < a.b && members < together; j0 += kWarp) {
      const int j = j0 + lane;
      const bool same = j < a.b && a.slots[j] == a.slots[b];
      before += __popc(__ballot_sync(~0u, same && j < b));
      const unsigned rest = __ballot_sync(~0u, same && j >= b);
      const int at = members + __popc(rest & ((1u << lane) - 1));
      if (same && j >= b && at < together)
        for (int i = 0; i < min(rows, kRows); ++i) unit.request[at * rows + i] = j;
      members += __popc(rest);
    }
    members = before % together ? 0 : min(members, together);
  }
  const int count = min(members * rows, row0 + kRows) - row0;
  if (lane < count) unit.row[lane] = rows < kRows ? lane % rows : row0 + lane;
  if (lane == 0) {
    unit.count = members ? count : 0;
    unit.begin = int(begin), unit.end = int(min(begin + size, int64_t(length)));
    unit.length = length;
  }
}

// Where a key lies: `outer` -1 for none, that is beyond the unit's or in a block that is not there.
struct Place {
  int outer, token;
  bool bad;
};
__device__ inline Place place_of(const Args& a, const Unit& unit, int key) {
  if (key >= unit.end) return {-1, 0, false};
  if (is_prefix(a)) return {a.slots[blockIdx.z], key, false};
  if (!a.table) return {int(blockIdx.z), key, false};
  const int named = a.table[blockIdx.z * a.table_stride + key / a.block];
  const bool bad = named < 0 || named >= a.block_count;
  return {bad ? -1 : named, key % a.block, bad};
}

// The keys low..high that a query of the unit sees.
__device__ inline void seen_by(const Args& a, const Unit& unit, int row, int* low, int* high) {
  const int after = is_prefix(a) ? unit.end : unit.length - a.t + unit.row[row] % a.t + 1;
  *low = !is_prefix(a) && a.window > 0 ? after - a.window : 0;
  *high = min(after, unit.end);
}

template <class T>
__device__ inline const T* query_of(const Args& a, const Unit& unit, int head, int row) {
  return static_cast<const T*>(a.q) +
         ((int64_t(unit.request[row]) * a.hkv + head) * rows_of(a) + unit.row[row]) * a.d;
}

}  // namespace
}  // namespace fusedpeft::cuda
