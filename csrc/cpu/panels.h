// Products of a block of rows with a matrix that is packed for it, fp32 inside. Included by one file
// for each instruction set.
#pragma once

#include "functions.h"

namespace fusedpeft::cpu {
namespace {

// Sums in registers: 24 of 32, or 12 of 16, and a row of the right side beside them.
constexpr int kTileRows = kRegisters >= 32 ? 8 : 6, kTileVectors = kRegisters >= 32 ? 3 : 2;
constexpr int64_t kTileColumns = kTileVectors * kWidth;
constexpr int64_t kChain = 256;  // products that one chain of sums takes: longer ones round worse

template <class T>
void load_as(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
template <class T>
void store_as(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(from[i], to + i);
}

// out[r, c] (+)= sum over k of a[r * sr + k * sk] * b[k, c], of kTileRows rows and NV vectors.
template <int NV, int64_t chain = kChain>
__attribute__((noinline)) void tile(const float* a, int64_t sr, int64_t sk, const float* b, int64_t k,
                                    float* out, int64_t so, bool fresh) {
  for (int64_t i = 0; i < k;) {
    F sums[kTileRows][NV] = {};
    for (const int64_t stop = min_of(i + chain, k); i < stop; ++i) {
      F row[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) row[n] = at(b + (i * NV + n) * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const F factor = all(a[r * sr + i * sk]);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) sums[r][n] = fma(factor, row[n], sums[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        float* to = out + r * so + n * kWidth;
        put(fresh ? sums[r][n] : at(to) + sums[r][n], to);
      }
    fresh = false;
  }
}

template <int64_t chain = kChain>
decltype(&tile<1, chain>) tile_of(int64_t vectors) {
  return vectors == 1 ? tile<1, chain> : vectors == 2 ? tile<2, chain> : tile<kTileVectors, chain>;
}

// Columns in blocks of at most kTileVectors vectors, all of nearly one width.
struct Columns {
  int64_t count, vectors, blocks;

  explicit Columns(int64_t count)
      : count(count), vectors(ceil_div(count, kWidth)), blocks(ceil_div(vectors, kTileVectors)) {}
  int64_t padded() const { return vectors * kWidth; }
  int64_t begin(int64_t block) const { return vectors * block / blocks * kWidth; }
  int64_t width(int64_t block) const { return begin(block + 1) - begin(block); }
};

// B [k, columns] as tile() wants it: block after block, each [k, width], padded with zeros.
struct Packed {
  float* data;
  int64_t k;
  Columns columns;

  const float* block(int64_t i) const { return data + columns.begin(i) * k; }

  // Row r of B from `row`, which has zeros behind it.
  void put_row(int64_t r, const float* row) const {
    for (int64_t i = 0; i < columns.blocks; ++i) {
      const int64_t first = columns.begin(i), width = columns.width(i);
      for (int64_t c = 0; c < width; c += kWidth)
        put(at(row + first + c), data + first * k + r * width + c);
    }
  }
  // Columns first.. (a vector of them) of B from as many rows of `rows`, which are B's columns.
  void put_columns(int64_t first, const float* rows, int64_t stride) const {
    int64_t i = 0;
    while (columns.begin(i + 1) <= first) ++i;
    const int64_t width = columns.width(i);
    float* to = data + columns.begin(i) * k + (first - columns.begin(i));
    for (int64_t r = 0; r < k; ++r)
      for (int64_t c = 0; c < kWidth; ++c) to[r * width + c] = rows[c * stride + r];
  }

  // out [rows, columns of block i] = a times the block, for rows rounded up to kTileRows.
  void multiply(int64_t i, const float* a, int64_t sa, int64_t rows, float* out, int64_t so) const {
    const int64_t vectors = columns.width(i) / kWidth;
    const auto run = tile_of(vectors);
    for (int64_t r = 0; r < rows; r += kTileRows)
      run(a + r * sa, sa, 1, block(i), k, out + r * so, so, true);
  }
};

}  // namespace
}  // namespace fusedpeft::cpu
