// Matrices for the drivers of csrc/cpu, each at the very end of an allocation of its own, so that a
// read beyond the last row is seen; the gaps between rows hold NaN, so that a read beyond any other
// is seen in the result.
#pragma once

#include "cpu/cpu.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

inline int failures = 0;

namespace fusedpeft::cpu {

inline float to_float(const unsigned char* p, int dtype) {
  if (dtype == kFloat32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (dtype == kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f
                                     : (1024.0f + fraction) * (1 << exponent) * 0x1p-25f;
  return bits >> 15 ? -size : size;
}

inline uint16_t half_of_eighths(int eighths) {
  const unsigned size = static_cast<unsigned>(std::abs(eighths));
  if (size == 0) return 0;
  const int top = 31 - __builtin_clz(size);
  return static_cast<uint16_t>((eighths < 0 ? 0x8000 : 0) | (top + 12) << 10 |
                               (size << (10 - top) & 1023));
}

struct Matrix {
  int64_t rows, cols, stride;
  int dtype;
  std::unique_ptr<unsigned char[]> bytes;

  Matrix(int64_t rows, int64_t cols, int64_t gap, int dtype)
      : rows(rows), cols(cols), stride(cols + gap), dtype(dtype),
        bytes(new unsigned char[static_cast<size_t>(rows ? (rows - 1) * stride + cols : 0) * size()]) {}
  int size() const { return dtype == kFloat32 ? 4 : 2; }
  unsigned char* at(int64_t i, int64_t j) const { return bytes.get() + (i * stride + j) * size(); }
  double operator()(int64_t i, int64_t j) const { return to_float(at(i, j), dtype); }
  std::vector<double> numbers() const {  // [rows, cols], for sums that take each one many times
    std::vector<double> found(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) found[static_cast<size_t>(i * cols + j)] = (*this)(i, j);
    return found;
  }

  void poison(int64_t i, int64_t from, int64_t to) {  // NaN
    if (from < to) std::memset(at(i, from), 0xff, static_cast<size_t>((to - from) * size()));
  }
  void fill(std::mt19937& random) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < (i + 1 < rows ? stride : cols); ++j) {
        // Eighths in [-2, 2] are exact in every dtype.
        const int eighths = static_cast<int>(random() % 33) - 16;
        const float v = j < cols ? static_cast<float>(eighths) / 8 : NAN;
        uint32_t word;
        std::memcpy(&word, &v, 4);
        const uint16_t half = dtype == kBFloat16 ? static_cast<uint16_t>(word >> 16)
                              : j < cols         ? half_of_eighths(eighths)
                                                 : 0x7fff;
        if (size() == 4) std::memcpy(at(i, j), &word, 4);
        if (size() == 2) std::memcpy(at(i, j), &half, 2);
      }
  }
};

struct Sum {
  double value = 0, size = 0;  // size: of the terms
  void add(double term) { value += term, size += std::fabs(term); }
  void add_products(const double* a, const double* b, int64_t k) {
    for (int64_t i = 0; i < k; ++i) add(a[i] * b[i]);
  }
};

inline double step_of(int dtype) {
  return dtype == kFloat32 ? 1e-6 : dtype == kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
}

}  // namespace fusedpeft::cpu

void multi_lora_checks();    // cpu_multi_lora.cpp
void quantised_checks();     // cpu_quantised.cpp
void prefix_train_checks();  // cpu_prefix_train.cpp
