// Which tokens go together in adapter_decode.cu, and which block takes which rows of D or U for them.
#pragma once

#include <algorithm>

#include "cuda/adapter_decode.h"
#include "cuda/device.h"

namespace fusedpeft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPiece = 8;       // elements of a load
constexpr int kTokens = 4;      // of a unit, at most: they share the reads of D and U
constexpr int kLeastPart = 64;  // rows of U that are worth a block
constexpr int kFew = 4;         // tokens: the bandwidth is not what counts
static_assert(kMostAdapterTokens <= kThreads, "a thread looks at one token");

struct Args : AdapterDecode {
  unsigned* work;
};

struct Split {  // of the rows of a matrix
  int rows, count;
};
__device__ inline Split split_rows(int64_t rows, int parts, int step) {  // of whole steps
  const int each = int((rows + parts - 1) / parts + step - 1) / step * step;
  return {each, int((rows + each - 1) / each)};
}

struct Shared {
  int slot[kMostAdapterTokens];
  short member[kMostAdapterTokens][kTokens];  // of each unit
  int count[kMostAdapterTokens];
  unsigned leads[kWarps];  // bit i of word w: whether token 32 w + i is the first of a unit
  int units;
  Split slices, parts;  // of D and of U, for each unit
  float sums[2][kWarps][kTokens];

  // Token g of unit u, or its last.
  __device__ int token(int u, int g) const { return member[u][min(g, count[u] - 1)]; }
  __device__ int slot_of(int u) const { return slot[member[u][0]]; }
  // Where part i of U finds the h of unit u: [kTokens, max_size].
  __device__ unsigned* copy_of(const Args& a, int u, int i) const {
    return a.work + int64_t(u + i * units) * kTokens * a.max_size;
  }
};

// The tokens of a slot in their order, kTokens a unit; units in the order of their first.
__device__ inline void find_units(const Args& a, Shared& s, int producers, int consumers) {
  const int t = threadIdx.x, m = int(a.m), mine = t < m ? t : 0;
  if (t < m) s.slot[t] = a.slots[t], s.count[t] = 0;
  __syncthreads();
  int before = 0, first = mine;  // tokens of its slot before it; the first of its unit
  for (int i = 0; i < mine; ++i) {
    if (s.slot[i] != s.slot[mine]) continue;
    if (before % kTokens == 0) first = i;
    ++before;
  }
  if (before % kTokens == 0) first = mine;
  const unsigned leads = __ballot_sync(~0u, t < m && first == t);
  if (t % kWarp == 0) s.leads[t / kWarp] = leads;
  __syncthreads();
  int unit = 0, units = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int all = __popc(s.leads[w]);
    units += all;
    unit += w < first / kWarp ? all : 0;
  }
  unit += __popc(s.leads[first / kWarp] & ((1u << first % kWarp) - 1));
  if (t < m) {
    s.member[unit][before % kTokens] = short(t);
    atomicAdd(&s.count[unit], 1);
  }
  if (t == 0) {
    s.units = units;
    s.slices = split_rows(a.max_size, max(1, producers / units), 1);
    s.parts = split_rows(a.d, max(1, consumers / units), 16);
  }
  __syncthreads();
}

}  // namespace
}  // namespace fusedpeft::cuda
