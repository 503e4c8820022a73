// The vectors that products.h asks for, of AVX-512 (F, BW, DQ, VL): 16 floats, 32 registers.
#pragma once

#include <immintrin.h>

#include "isa.h"

namespace fusedpeft::cpu {
namespace {

constexpr int kWidth = 16, kRegisters = 32;
constexpr bool kHalvesInOrder = true;
typedef __m512 F;

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

template <int part>
inline F half(const Float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part));
}

struct Nf4Table {
  F numbers;

  Nf4Table(const float* from, float factor)
      : numbers(_mm512_loadu_ps(from) * factor) {}
  F at(const uint8_t* p) const {  // a permutation looks at the low four bits of its lanes
    int low, high;
    __builtin_memcpy(&low, p, 4);
    __builtin_memcpy(&high, p + 4, 4);
    const __m512i bytes = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    const __m512i shift =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    return _mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srlv_epi32(0xffff, bytes, shift), numbers);
  }
};

// As halves, whose exponent has a bit more.
inline F e4m3(const uint8_t* p) {
  const __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16(-0x4080));
  return _mm512_maskz_cvtph_ps(0xffff, half);
}
inline bool any_nan(const uint8_t* p) {
  const __m512i sign = _mm512_set1_epi8(-128), codes = _mm512_loadu_si512(p);
  return _mm512_cmpeq_epi8_mask(_mm512_or_si512(codes, sign), _mm512_set1_epi8(-1)) != 0;
}
inline void put_half(F v, Float16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, 0));
}

}  // namespace
}  // namespace fusedpeft::cpu
