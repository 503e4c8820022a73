// Ragged shapes through csrc/cpu against sums in double, for AddressSanitizer and UBSan.
//
// Every matrix lies at the very end of an allocation of its own, so that a read beyond the last row
// is seen; the gaps between rows hold NaN, so that a read beyond any other is seen in y.
#include "cpu/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace fusedpeft::cpu;

namespace {

float to_float(const unsigned char* p, int dtype) {
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
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(1024.0f + fraction, exponent - 25);
  return bits >> 15 ? -size : size;
}

uint16_t half_of_eighths(int eighths) {
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

int failures = 0;

void decode(int64_t m, int64_t k, int64_t n, int64_t r, int dtype, int adapter, bool bias, int gap) {
  std::mt19937 random(static_cast<unsigned>(m * 31 + k * 7 + n * 3 + r));
  Matrix x(m, k, gap, dtype), w(n, k, gap, dtype), a(r, k, gap, adapter), b(n, r, gap, adapter),
      c(1, n, 0, dtype), y(m, n, gap, dtype);
  for (Matrix* t : {&x, &w, &a, &b, &c, &y}) t->fill(random);
  lora_decode(x.bytes.get(), w.bytes.get(), a.bytes.get(), b.bytes.get(),
              bias ? c.bytes.get() : nullptr, y.bytes.get(), m, k, n, r, x.stride, w.stride,
              a.stride, b.stride, y.stride, 0.25, dtype, adapter);
  const double step = dtype == kFloat32 ? 1e-6 : dtype == kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double want = bias ? c(0, j) : 0.0, size = std::fabs(want);
      for (int64_t l = 0; l < k; ++l) want += x(i, l) * w(j, l), size += std::fabs(x(i, l) * w(j, l));
      for (int64_t q = 0; q < r; ++q) {
        double s = 0;
        for (int64_t l = 0; l < k; ++l) s += x(i, l) * a(q, l);
        want += 0.25 * s * b(j, q), size += std::fabs(0.25 * s * b(j, q));
      }
      if (!(std::fabs(y(i, j) - want) <= step * std::fabs(want) + 1e-6 * size)) {
        if (failures++ < 5)
          std::printf("m %ld k %ld n %ld r %ld dtype %d/%d: y[%ld,%ld] expected %g, got %g\n", m, k,
                      n, r, dtype, adapter, i, j, want, y(i, j));
      }
    }
  for (int64_t i = 0; i + 1 < m; ++i)
    for (int64_t j = n; j < y.stride; ++j)
      if (!std::isnan(y(i, j)) && failures++ < 5) std::printf("y[%ld,%ld] was overwritten\n", i, j);
}

void drop(int64_t rows, int64_t cols, int dtype, int gap) {
  std::mt19937 random(7);
  Matrix x(rows, cols, gap, dtype), out(rows, cols, 2 * gap, dtype);
  x.fill(random), out.fill(random);
  dropout(x.bytes.get(), out.bytes.get(), rows, cols, x.stride, out.stride, 0.5, -3, dtype);
  int64_t kept = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      kept += out(i, j) != 0;
      if (out(i, j) != 0 && out(i, j) != 2 * x(i, j) && failures++ < 5)
        std::printf("dropout [%ld,%ld]: expected %g or 0, got %g\n", i, j, 2 * x(i, j), out(i, j));
    }
  if (rows * cols > 1000 && std::fabs(static_cast<double>(kept) / (rows * cols) - 0.484) > 0.05 &&
      failures++ < 5)
    std::printf("dropout %ldx%ld: kept %ld\n", rows, cols, kept);
}

bool refuses(int64_t m, int64_t r, int dtype, int adapter) {
  float v[4] = {};
  try {
    lora_decode(v, v, v, v, nullptr, v, m, 1, 1, r, 1, 1, 1, 1, 1, 1.0, dtype, adapter);
  } catch (const std::exception& e) {
    return std::string(e.what()).find("expected") != std::string::npos;
  }
  return false;
}

#include "cpu_adapters.h"
#include "cpu_prefix.h"

}  // namespace

int main() {
  adapters();
  const int pairs[][2] = {{0, 0}, {1, 1}, {1, 0}, {2, 2}, {2, 0}};
  for (const auto& [dtype, adapter] : pairs) {
    for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 19})
      for (int64_t k : {0, 1, 31, 129}) decode(m, k, 23, 5, dtype, adapter, m % 2, 3);
    for (int64_t r : {1, 8, 17, 64, 100}) decode(5, 40, 9, r, dtype, adapter, true, 0);
    for (int64_t n : {0, 1, 2, 30, 49}) decode(3, 33, n, 4, dtype, adapter, false, 1);
    decode(13, 1100, 130, 16, dtype, adapter, true, 5);  // two tiles and a tail, several threads
    decode(1, 700, 1000, 3, dtype, adapter, true, 0);
  }
  for (int dtype : {0, 1, 2}) {
    drop(0, 5, dtype, 0), drop(1, 1, dtype, 0), drop(3, 63, dtype, 1), drop(40, 1000, dtype, 3);
    drop(2, 64, dtype, 0);
  }
  if (!refuses(-1, 1, 0, 0) || !refuses(1, 0, 0, 0) || !refuses(1, 1, 3, 3) || !refuses(1, 1, 1, 2))
    ++failures, std::puts("bad arguments were taken");
  prefixes();
  std::printf("%s: %d failures\n", cpu_capability(), failures);
  return failures != 0;
}
