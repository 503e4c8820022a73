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

struct Nf4Floats {
  static constexpr int kCount = 16;
  F numbers;

  explicit Nf4Floats(const float* from) : numbers(_mm512_loadu_ps(from)) {}
  void put(const uint8_t* codes, float* out) const {  // lanes but for their low four bits are ignored
    int low, high;
    __builtin_memcpy(&low, codes, 4);
    __builtin_memcpy(&high, codes + 4, 4);
    const __m512i bytes = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    const __m512i shift =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m512i at = _mm512_maskz_srlv_epi32(0xffff, bytes, shift);
    _mm512_storeu_ps(out, _mm512_maskz_permutexvar_ps(0xffff, at, numbers));
  }
};
struct Nf4Words {
  static constexpr int kCount = 32;
  __m512i numbers;  // twice, as a permutation looks at five bits

  explicit Nf4Words(const void* from)
      : numbers(_mm512_maskz_broadcast_i64x4(
            0xff, _mm256_loadu_si256(static_cast<const __m256i*>(from)))) {}
  void put(const uint8_t* codes, void* out) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    const __m512i at = _mm512_or_si512(_mm512_maskz_srli_epi32(0xffff, wide, 4),
                                       _mm512_maskz_slli_epi32(0xffff, wide, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(at, numbers));
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
inline void put(F v, Float16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, 0));
}

}  // namespace
}  // namespace fusedpeft::cpu
