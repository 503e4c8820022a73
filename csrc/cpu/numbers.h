// Conversions of single numbers, compiled for the instruction set of the file that includes this.
//
// Internal linkage, and nothing from the standard library, here and in the kernels: of an inline
// function that several files share, the linker might keep the copy compiled for AVX-512.
#pragma once

#include "isa.h"

#define FUSEDPEFT_INLINE inline __attribute__((always_inline))

namespace fusedpeft::cpu {
namespace {

FUSEDPEFT_INLINE constexpr int64_t min_of(int64_t a, int64_t b) { return b < a ? b : a; }
FUSEDPEFT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FUSEDPEFT_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class To, class From>
FUSEDPEFT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

FUSEDPEFT_INLINE float to_float(float v) { return v; }
FUSEDPEFT_INLINE float to_float(BFloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }
FUSEDPEFT_INLINE float to_float(Float16 v) {
  const uint32_t sign = uint32_t{v.bits} >> 15 << 31, rest = v.bits & 0x7fffu;
  // A product rebiases the exponent: exact, and subnormal halves come along.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f);
  return bit_cast<float>(sign | (rest < 0x7c00u ? finite : rest << 13 | 0x7f800000u));
}

// Round to nearest, ties to even.
FUSEDPEFT_INLINE void from_float(float v, float* out) { *out = v; }
FUSEDPEFT_INLINE void from_float(float v, BFloat16* out) {
  const uint32_t u = bit_cast<uint32_t>(v);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
FUSEDPEFT_INLINE void from_float(float v, Float16* out) {
  const uint32_t u = bit_cast<uint32_t>(v), size = u & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00;
  } else if (size >= 0x477ff000u) {  // 65520: rounds past the largest half
    half = 0x7c00;
  } else if (size < 0x38800000u) {  // below 2^-14 the step is 2^-24, that of floats at 0.5
    half = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>((u >> 16 & 0x8000u) | half);
}

}  // namespace
}  // namespace fusedpeft::cpu
