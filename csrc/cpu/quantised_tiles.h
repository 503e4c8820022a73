// Decode over W in 4 or 8 bits in tiles: its numbers are rounded to bf16, as who multiplies in bf16
// does, some columns of 16 rows at a time, and lie in the L1 when multi_lora_tiles.h takes them.
#pragma once

#include "multi_lora_tiles.h"
#include "quantised.h"

namespace fusedpeft::cpu {
namespace {

template <class Pairs, bool nf4>
struct MadeOfCodes {
  const Quantised& w;

  // to[rows, cols] = W[n.., col..]; cols: a multiple of Pairs' block, at most kPiece.
  __attribute__((noinline)) void operator()(int64_t n, int64_t rows, int64_t col, int64_t cols,
                                            BFloat16* to, int64_t stride) const {
    for (int64_t i = 0; i < rows; ++i, to += stride) {
      fetch_codes<nf4>(w, n + i + rows, col, cols);
      if constexpr (nf4) {
        nf4_values(w, n + i, col, cols, to);
      } else {
        alignas(kLine) float piece[kPiece];
        fp8_values<true>(w, n + i, col, cols, piece);
        for (int64_t j = 0; j < cols; j += Pairs::kBlock) Pairs::narrow(piece + j, to + j);
      }
    }
  }
};

template <class Pairs>
void decode_quantised_in_tiles(const Decode& d, const Quantised& w) {
  if (w.block) return decode_in_tiles<Pairs>(d, MadeOfCodes<Pairs, true>{w});
  return decode_in_tiles<Pairs>(d, MadeOfCodes<Pairs, false>{w});
}

}  // namespace
}  // namespace fusedpeft::cpu
