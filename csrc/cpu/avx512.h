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

}  // namespace
}  // namespace fusedpeft::cpu
