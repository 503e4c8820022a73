// Rows of W out of its codes in 4 or 8 bits, and decode over them; the layouts are those of
// pyext/ops/quantised.py. Beside what products.h asks for, the instruction set's file has defined
//   Nf4Table                     made of 16 floats and a factor; at(p): kWidth of its numbers, for
//                                the nibbles of kWidth / 2 bytes, the high one of a byte first
//   e4m3(const uint8_t*)         kWidth numbers of 8 bits times 2^-8, none of them NaN
//   any_nan(const uint8_t*)      whether one of 64 is
//   put_half(F, Float16*)        rounded to nearest, ties to even
//
// W's numbers are those of the specification to the bit: each is a code times a factor, rounded once.
#pragma once

#include "decode.h"
#include "functions.h"

namespace fusedpeft::cpu {
namespace {

constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr int64_t kBlocks2 = 256;  // that share an absmax2
constexpr int64_t kPiece = 512;    // numbers of a row that are made at once: rows stay in the L1

// The compiler must not make one rounding of a product and a sum.
FUSEDPEFT_INLINE float rounded(float v) {
  asm("" : "+m"(v));
  return v;
}

FUSEDPEFT_INLINE float nf4_scale(const Quantised& w, int64_t block) {
  if (!w.book) return static_cast<const float*>(w.scale)[block];
  const float fine = w.book[static_cast<const uint8_t*>(w.scale)[block]];
  return rounded(fine * w.absmax2[block / kBlocks2]) + *w.offset;
}

// out[cols]: elements from column `col`, an even one, of a row on.
__attribute__((noinline)) void nf4_values(const Quantised& w, int64_t row, int64_t col, int64_t cols,
                                          float* out) {
  int64_t e = row * w.k + col;
  const int64_t stop = e + cols;
  while (e < stop) {
    const int64_t block = e / w.block, end = min_of((block + 1) * w.block, stop);
    const float scale = nf4_scale(w, block);
    const uint8_t* codes = w.codes + e / 2;
    const Nf4Table table(kNf4, scale);
    for (; e + kWidth <= end; e += kWidth, codes += kWidth / 2, out += kWidth)
      put(table.at(codes), out);
    for (; e < end; e += 2, ++codes) {
      *out++ = kNf4[*codes >> 4] * scale;
      if (e + 1 < end) *out++ = kNf4[*codes & 15] * scale;
    }
  }
}

FUSEDPEFT_INLINE float one_e4m3(uint8_t code) {
  const uint32_t size = code & 0x7fu, half = (code & 0x80u) << 8 | size << 7;
  return size == 0x7f ? bit_cast<float>(0x7fc00000u)
                      : to_float(Float16{static_cast<uint16_t>(half)}) * 0x1p8f;
}

// Without `scaled` the codes alone.
template <bool scaled>
__attribute__((noinline)) void fp8_values(const Quantised& w, int64_t row, int64_t col, int64_t cols,
                                          float* out) {
  constexpr int64_t kStep = 64;
  const uint8_t* codes = w.codes + row * w.k + col;
  const float scale = scaled ? static_cast<const float*>(w.scale)[w.by_row ? row : 0] : 1.0f;
  int64_t i = 0;
  for (; i + kStep <= cols; i += kStep) {
    if (__builtin_expect(any_nan(codes + i), 0)) {
      for (int64_t j = i; j < i + kStep; ++j) out[j] = one_e4m3(codes[j]) * scale;
      continue;
    }
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kStep; j += kWidth) {
      const F v = e4m3(codes + j) * 0x1p8f;  // exact; the factors as one might overflow
      put(scaled ? v * scale : v, out + j);
    }
  }
  for (; i < cols; ++i) out[i] = one_e4m3(codes[i]) * scale;
}

// --- rows as numbers ----------------------------------------------------------------------------

FUSEDPEFT_INLINE void put_numbers(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
FUSEDPEFT_INLINE void put_numbers(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(from[i], to + i);
}
FUSEDPEFT_INLINE void put_numbers(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) put_half(at(from + i), to + i);
  for (; i < n; ++i) from_float(from[i], to + i);
}

template <class T, bool nf4>
void dequantise_rows(const Dequantise& d, int64_t begin, int64_t end) {
  alignas(64) float piece[kPiece];
  for (int64_t i = begin; i < end; ++i) {
    T* out = static_cast<T*>(d.out) + i * d.so;
    for (int64_t j = 0; j < d.cols; j += kPiece) {
      const int64_t cols = min_of(kPiece, d.cols - j);
      float* to = piece;
      if constexpr (__is_same(T, float)) to = out + j;
      if constexpr (nf4) {
        nf4_values(d.w, d.row + i, d.col + j, cols, to);
      } else {
        fp8_values<true>(d.w, d.row + i, d.col + j, cols, to);
      }
      if constexpr (!__is_same(T, float)) put_numbers(piece, out + j, cols);
    }
  }
}

template <class T>
void dequantise_as(const Dequantise& d) {
  const auto rows = d.w.block ? dequantise_rows<T, true> : dequantise_rows<T, false>;
  // A core does some 2^16 elements while another wakes up.
  const int64_t worth = d.rows * d.cols >> 16;
  const int threads = static_cast<int>(min_of(min_of(omp_get_max_threads(), worth), d.rows));
  if (threads <= 1) return rows(d, 0, d.rows);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    rows(d, d.rows * thread / team, d.rows * (thread + 1) / team);
  }
}

inline void dequantise_any(const Dequantise& d) {
  if (d.dtype == kFloat32) return dequantise_as<float>(d);
  if (d.dtype == kBFloat16) return dequantise_as<BFloat16>(d);
  return dequantise_as<Float16>(d);
}

// --- decode -------------------------------------------------------------------------------------

// On its way to the cache: what the row has of these columns, or lies behind W.
template <bool nf4>
FUSEDPEFT_INLINE void fetch_codes(const Quantised& w, int64_t row, int64_t col, int64_t cols) {
  const auto* codes = reinterpret_cast<const char*>(w.codes);
  const int64_t from = row * w.k + col, half = nf4 ? 2 : 1;
  for (int64_t b = 0; b < cols / half; b += kLine) __builtin_prefetch(codes + from / half + b, 0, 2);
}

// W as Call takes it: some columns of a few rows at a time are made in fp32 and multiplied while they
// lie in the L1. The rows of FP8 get their scale at the end.
template <bool nf4>
struct Codes {
  const Quantised& w;

  template <class P, int G>
  __attribute__((noinline)) void products(F* acc, int64_t n, int64_t rows, const Tokens<P>& x,
                                          const Groups& groups) const {
    constexpr int64_t kRow = kPiece + kLine / 4;  // rows a power of two apart share sets of the L1
    alignas(64) float piece[rows_for(G) * kRow];
    int64_t col = 0;
    do {
      const int64_t cols = min_of(kPiece, w.k - col), whole = round_up(cols, P::kBlock);
      for (int64_t i = 0; i < rows; ++i) {
        float* to = piece + i * kRow;
        fetch_codes<nf4>(w, n + i + rows, col, cols);
        if constexpr (nf4) {
          nf4_values(w, n + i, col, cols, to);
        } else {
          fp8_values<false>(w, n + i, col, cols, to);
        }
        for (int64_t j = cols; j < whole; ++j) to[j] = 0;  // as x is padded
      }
      const Tokens<P> part{x.x + col, x.m, whole, x.stride};
      dot_rows<P, G>(acc, col == 0, piece, kRow, rows, part, groups, false);
      col += kPiece;
    } while (col < w.k);
    for (int64_t i = 0; !nf4 && i < rows; ++i) {
      const float scale = static_cast<const float*>(w.scale)[w.by_row ? n + i : 0];
      for (int64_t m = 0; m < x.m; ++m) acc[i * kTokens + m] *= scale;
    }
  }
};

template <class T, class TA, bool nf4>
void decode_codes(const Decode& d, const Quantised& w) {
  decode_as<T, TA, Wide<float>, Wide<TA>>(d, Codes<nf4>{w});
}

template <class T>
void decode_quantised_as(const Decode& d, const Quantised& w) {
  const bool nf4 = w.block != 0;
  if (d.adapter_dtype == d.dtype)
    return nf4 ? decode_codes<T, T, true>(d, w) : decode_codes<T, T, false>(d, w);
  if constexpr (sizeof(T) == 2)
    return nf4 ? decode_codes<T, float, true>(d, w) : decode_codes<T, float, false>(d, w);
}

inline void decode_quantised_any(const Decode& d, const Quantised& w) {
  if (d.dtype == kFloat32) return decode_quantised_as<float>(d, w);
  if (d.dtype == kBFloat16) return decode_quantised_as<BFloat16>(d, w);
  return decode_quantised_as<Float16>(d, w);
}

}  // namespace
}  // namespace fusedpeft::cpu
