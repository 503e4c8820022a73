// out = x * keep / (1 - p) in one pass; the mask is specified in pyext/ops/dropout.py.
//
//   key1 = mix(mix(row_lo ^ seed_lo) + seed_hi + row_hi),   key2 = mix(key1 ^ 0x9E3779B9)
//   keep(row, col) = mix(mix(col + key1) ^ key2) >= floor(p * 2^32)
#pragma once

#include <omp.h>

#include "isa.h"
#include "numbers.h"

namespace fusedpeft::cpu {
namespace {

FUSEDPEFT_INLINE uint32_t mix(uint32_t h) {  // lowbias32
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ h >> 16;
}

// Of a row, `count` columns from `col` on. The loops are plain: the compiler makes vectors of them.
template <class T>
FUSEDPEFT_INLINE void dropout_columns(const T* x, T* out, uint32_t col, int count, uint32_t key1,
                                      uint32_t key2, uint32_t threshold, float kept) {
  for (int i = 0; i < count; ++i) {
    // Bits, not a choice: with a branch the compiler makes no vectors.
    const uint32_t hash = mix(mix(col + static_cast<uint32_t>(i) + key1) ^ key2);
    const uint32_t keep = 0u - static_cast<uint32_t>(hash >= threshold);
    from_float(bit_cast<float>(bit_cast<uint32_t>(to_float(x[i]) / kept) & keep), out + i);
  }
}

template <class T>
void dropout_rows(const Dropout& d, int64_t begin, int64_t end) {
  constexpr int kStep = 64;  // a constant, so that whole steps have no tail
  const uint32_t threshold = static_cast<uint32_t>(d.p * 0x1p32);
  const float kept = static_cast<float>(1.0 - d.p);
  for (int64_t row = begin; row < end; ++row) {
    const uint64_t r = static_cast<uint64_t>(row);
    const uint32_t key1 = mix(mix(static_cast<uint32_t>(r ^ d.seed)) +
                              static_cast<uint32_t>(d.seed >> 32) + static_cast<uint32_t>(r >> 32));
    const uint32_t key2 = mix(key1 ^ 0x9e3779b9u);
    const T* x = static_cast<const T*>(d.x) + row * d.sx;
    T* out = static_cast<T*>(d.out) + row * d.so;
    int64_t col = 0;
    for (; col + kStep <= d.cols; col += kStep)
      dropout_columns(x + col, out + col, static_cast<uint32_t>(col), kStep, key1, key2, threshold,
                      kept);
    dropout_columns(x + col, out + col, static_cast<uint32_t>(col), static_cast<int>(d.cols - col),
                    key1, key2, threshold, kept);
  }
}

template <class T>
void dropout_as(const Dropout& d) {
  // A core does some 2^14 elements while another wakes up.
  const int64_t worth = d.rows * d.cols >> 14;
  const int threads = static_cast<int>(min_of(min_of(omp_get_max_threads(), worth), d.rows));
  if (threads <= 1) return dropout_rows<T>(d, 0, d.rows);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    dropout_rows<T>(d, d.rows * thread / team, d.rows * (thread + 1) / team);
  }
}

inline void dropout_any(const Dropout& d) {
  if (d.dtype == kFloat32) return dropout_as<float>(d);
  if (d.dtype == kBFloat16) return dropout_as<BFloat16>(d);
  return dropout_as<Float16>(d);
}

}  // namespace
}  // namespace fusedpeft::cpu
