// What quantised.h asks for, in plain C++.
#pragma once

#include "numbers.h"

namespace fusedpeft::cpu {
namespace {

struct Nf4Table {
  float numbers[16];

  Nf4Table(const float* from, float factor) {
    for (int i = 0; i < 16; ++i) numbers[i] = from[i] * factor;
  }
  F at(const uint8_t* p) const {
    F v;
    for (int i = 0; i < kWidth; i += 2) v[i] = numbers[p[i / 2] >> 4], v[i + 1] = numbers[p[i / 2] & 15];
    return v;
  }
};

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
inline void put_half(F v, Float16* p) {
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p + i);
}

}  // namespace
}  // namespace fusedpeft::cpu
