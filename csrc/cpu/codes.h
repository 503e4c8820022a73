// What quantised.h asks for, in plain C++.
#pragma once

#include "numbers.h"

namespace fusedpeft::cpu {
namespace {

template <class T>
struct Nf4Numbers {
  static constexpr int kCount = 4;
  T numbers[16];

  explicit Nf4Numbers(const void* from) { __builtin_memcpy(numbers, from, sizeof numbers); }
  void put(const uint8_t* codes, void* out) const {
    const T found[] = {numbers[codes[0] >> 4], numbers[codes[0] & 15], numbers[codes[1] >> 4],
                       numbers[codes[1] & 15]};
    __builtin_memcpy(out, found, sizeof found);
  }
};
using Nf4Floats = Nf4Numbers<float>;
using Nf4Words = Nf4Numbers<uint16_t>;

inline F e4m3(const uint8_t* p) {
  F v;
  for (int i = 0; i < kWidth; ++i)
    v[i] = to_float(Float16{static_cast<uint16_t>((p[i] & 0x80u) << 8 | (p[i] & 0x7fu) << 7)});
  return v;
}
inline bool any_nan(const uint8_t* p) {
  bool found = false;
  for (int i = 0; i < 64; ++i) found |= (p[i] & 0x7f) == 0x7f;
  return found;
}
inline void put(F v, Float16* p) {
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p + i);
}

}  // namespace
}  // namespace fusedpeft::cpu
