// Products of matrices of bf16 in tiles of 16 rows of 64 bytes, as AMX has them: of a left side 32
// numbers of each row, of a right side pairs of rows, of 16 columns each; sums in fp32.
//
// Included after a file has defined
//   tile_zero<t>(), tile_load<t>(from, bytes), tile_store<t>(to, bytes), tile_dot<c, w, x>() and what
//   is around them, as in multi_lora_tiles.h
//   Half   16 numbers of uint16_t; words(Half), those widened to 32 bits; narrow(F), rounded to bf16,
//   narrow(low, high), 32 of them in a U
#pragma once

#include "functions.h"

namespace fusedpeft::cpu {
namespace {

constexpr int64_t kSide = 16, kDeep = 32;  // rows and columns of a tile; numbers that meet in one
constexpr int64_t kTileWords = kSide * kSide;  // of 32 bits

typedef uint16_t UnalignedH __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

// n numbers, zeros behind them.
FUSEDPEFT_INLINE Half halves(const BFloat16* from, int64_t n = kSide) {
  if (n >= kSide) return *reinterpret_cast<const UnalignedH*>(from);
  uint16_t some[kSide] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = from[i].bits;
  return *reinterpret_cast<const UnalignedH*>(some);
}
FUSEDPEFT_INLINE void put(Half v, BFloat16* to, int64_t n = kSide) {
  if (n >= kSide) {
    *reinterpret_cast<UnalignedH*>(to) = v;
  } else {
    for (int64_t i = 0; i < n; ++i) to[i].bits = v[i];
  }
}
FUSEDPEFT_INLINE F widened(Half v) { return reinterpret_cast<F>(words(v) << 16); }
FUSEDPEFT_INLINE U pairs(Half low, Half high) { return words(low) | words(high) << 16; }
FUSEDPEFT_INLINE void put(U v, uint32_t* to) { *reinterpret_cast<UnalignedU*>(to) = v; }

// Lane l of v[i] becomes lane i of v[l].
template <int half = kSide / 2>
FUSEDPEFT_INLINE void transpose(U (&v)[kSide]) {
  U above, below;
  for (uint32_t l = 0; l < kSide; ++l) {
    above[l] = l & half ? kSide + (l ^ half) : l;
    below[l] = l & half ? kSide + l : l ^ half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if (i & half) continue;
    const U one = v[i], other = v[i + half];
    v[i] = __builtin_shuffle(one, other, above);
    v[i + half] = __builtin_shuffle(one, other, below);
  }
  if constexpr (half > 1) transpose<half / 2>(v);
}

// A right side [k, n], n's tiles one after the other, each with its steps over k.
struct Right {
  uint32_t* data;
  int64_t steps;

  uint32_t* tile(int64_t n, int64_t k) const { return data + (n * steps + k) * kTileWords; }
};

// out [32 or 16, 16 count] (+)= a left side times tiles n.. of b. Of the left side, in bytes, rows are
// `sa` apart, tiles `step`, those of the lower 16 rows `below` the upper ones. meanwhile(k): beside step
// k.
template <int count, bool both, class Meanwhile>
FUSEDPEFT_INLINE void multiply(const void* a, int64_t sa, int64_t step, int64_t below, const Right& b,
                               int64_t n, int64_t steps, float* out, int64_t so, bool fresh,
                               Meanwhile meanwhile) {
  const auto* from = static_cast<const char*>(a);
  float* down = out + kSide * so;
  const int64_t row = 4 * so;
  if (fresh) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(out, row);
    if (both) tile_load<1>(down, row);
    if (count > 1) tile_load<2>(out + kSide, row);
    if (count > 1 && both) tile_load<3>(down + kSide, row);
  }
  for (int64_t k = 0; k < steps; ++k, from += step) {
    meanwhile(k);
    tile_load<4>(from, sa);
    if (both) tile_load<5>(from + below, sa);
    tile_load<6>(b.tile(n, k), kLine);
    tile_dot<0, 4, 6>();
    if (both) tile_dot<1, 5, 6>();
    if (count == 1) continue;
    tile_load<7>(b.tile(n + 1, k), kLine);
    tile_dot<2, 4, 7>();
    if (both) tile_dot<3, 5, 7>();
  }
  tile_store<0>(out, row);
  if (both) tile_store<1>(down, row);
  if (count > 1) tile_store<2>(out + kSide, row);
  if (count > 1 && both) tile_store<3>(down + kSide, row);
}

constexpr auto nothing = [](int64_t) {};  // meanwhile

}  // namespace
}  // namespace fusedpeft::cpu
