// The products of bf16 that AVX-512 with BF16 has.
#pragma once

#include "avx512.h"
#include "products.h"

namespace fusedpeft::cpu {
namespace {

// The product of bf16 rows without unpacking: each lane adds two products to its fp32 sum.
struct Pairs {
  using Element = BFloat16;
  using Packed = BFloat16;
  static constexpr int kParts = 1, kBlock = 2 * kWidth;

  template <int>
  static FUSEDPEFT_INLINE __m512bh load(const BFloat16* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static FUSEDPEFT_INLINE F mac(__m512bh w, __m512bh x, F acc) {
    return _mm512_dpbf16_ps(acc, w, x);
  }
  static FUSEDPEFT_INLINE void narrow(const float* from, BFloat16* to) {  // subnormals become 0
    const auto v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kWidth), _mm512_loadu_ps(from));
    __builtin_memcpy(to, &v, sizeof v);
  }
  static FUSEDPEFT_INLINE void pack(const BFloat16* from, BFloat16* to) {
    __builtin_memcpy(to, from, kBlock * sizeof *to);
  }
};

}  // namespace
}  // namespace fusedpeft::cpu
