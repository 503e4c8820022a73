// Rows of W out of its codes in 4 or 8 bits, and decode over them; the layouts are those of
// pyext/ops/quantised.py. Beside what products.h asks for, the instruction set's file has defined
//   Nf4Floats, Nf4Words          made of 16 numbers of 32 or 16 bits; put(codes, out): kCount of them,
//                                for the nibbles of kCount / 2 bytes, the high one of a byte first
//   e4m3(const uint8_t*)         kWidth numbers of 8 bits times 2^-8, none of them NaN
//   any_nan(const uint8_t*)      whether one of 64 is
//   put(F, Float16*)             rounded to nearest, ties to even
//
// W's numbers are those of the specification to the bit: each is a code times a factor, rounded to
// fp32 and then to what is asked for; NF4 does that once for all numbers of a block.
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

FUSEDPEFT_INLINE void put(F v, BFloat16* p) {  // as from_float
  typedef uint16_t H __attribute__((vector_size(2 * kWidth)));
  const U u = reinterpret_cast<U>(v), is_nan = reinterpret_cast<U>((u & 0x7fffffffu) > 0x7f800000u);
  const U near = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
  const H out = __builtin_convertvector((is_nan & nan) | (~is_nan & near), H);
  __builtin_memcpy(p, &out, sizeof out);
}

template <class T>
struct Nf4Table {
  using Of = Nf4Words;
};
template <>
struct Nf4Table<float> {
  using Of = Nf4Floats;
};

// out[cols]: elements from column `col`, an even one, of a row on.
template <class T>
__attribute__((noinline)) void nf4_values(const Quantised& w, int64_t row, int64_t col, int64_t cols,
                                          T* out) {
  using Table = typename Nf4Table<T>::Of;
  constexpr int kCount = Table::kCount, kStep = 64;  // no block is shorter
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.block));
  int64_t e = row * w.k + col, block = e >> shift;
  const int64_t stop = e + cols;
  const uint8_t* codes = w.codes + e / 2;
  for (; e < stop; ++block) {
    const int64_t end = min_of((block + 1) << shift, stop);
    const float scale = nf4_scale(w, block);
    alignas(kLine) T numbers[16];
    for (int i = 0; i < 16; i += kWidth) put(at(kNf4 + i) * scale, numbers + i);
    const Table table(numbers);
    for (; e + kStep <= end; e += kStep, codes += kStep / 2, out += kStep)
#pragma GCC unroll 16
      for (int i = 0; i < kStep; i += kCount) table.put(codes + i / 2, out + i);
    for (; e + kCount <= end; e += kCount, codes += kCount / 2, out += kCount) table.put(codes, out);
    for (; e < end; e += 2, ++codes) {
      *out++ = numbers[*codes >> 4];
      if (e + 1 < end) *out++ = numbers[*codes & 15];
    }
  }
}

FUSEDPEFT_INLINE float one_e4m3(uint8_t code) {
  const uint32_t size = code & 0x7fu, half = (code & 0x80u) << 8 | size << 7;
  return size == 0x7f ? bit_cast<float>(0x7fc00000u)
                      : to_float(Float16{static_cast<uint16_t>(half)}) * 0x1p8f;
}

// Without `scaled` the codes alone, times 2^-8.
template <bool scaled>
__attribute__((noinline)) void fp8_values(const Quantised& w, int64_t row, int64_t col, int64_t cols,
                                          float* out) {
  constexpr int64_t kStep = 64;
  const uint8_t* codes = w.codes + row * w.k + col;
  const float scale = scaled ? static_cast<const float*>(w.scale)[w.by_row ? row : 0] : 0x1p-8f;
  const float factor = scale * 0x1p8f;  // exact, but for what overflows
  const bool alone = factor - factor != 0;
  int64_t i = 0;
  for (; i + kStep <= cols; i += kStep) {
    if (__builtin_expect(any_nan(codes + i) || alone, 0)) {
      for (int64_t j = i; j < i + kStep; ++j) out[j] = one_e4m3(codes[j]) * scale;
      continue;
    }
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kStep; j += kWidth)
      put(scaled ? e4m3(codes + j) * factor : e4m3(codes + j), out + j);
  }
  for (; i < cols; ++i) out[i] = one_e4m3(codes[i]) * scale;
}

// --- rows as numbers ----------------------------------------------------------------------------

template <class T>
FUSEDPEFT_INLINE void put_numbers(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) put(at(from + i), to + i);
  for (; i < n; ++i) from_float(from[i], to + i);
}

FUSEDPEFT_INLINE void fp8_numbers(const Quantised& w, int64_t row, int64_t col, int64_t cols,
                                  float* out) {
  fp8_values<true>(w, row, col, cols, out);
}
template <class T>
void fp8_numbers(const Quantised& w, int64_t row, int64_t col, int64_t cols, T* out) {
  alignas(kLine) float piece[kPiece];
  for (int64_t j = 0; j < cols; j += kPiece) {
    const int64_t count = min_of(kPiece, cols - j);
    fp8_values<true>(w, row, col + j, count, piece);
    put_numbers(piece, out + j, count);
  }
}

template <class T, bool nf4>
void dequantise_rows(const Dequantise& d, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* out = static_cast<T*>(d.out) + i * d.so;
    if constexpr (nf4) {
      nf4_values(d.w, d.row + i, d.col, d.cols, out);
    } else {
      fp8_numbers(d.w, d.row + i, d.col, d.cols, out);
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
    alignas(kLine) float piece[rows_for(G) * kRow];
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
      for (int64_t m = 0; m < x.m; ++m) acc[i * kTokens + m] = acc[i * kTokens + m] * 0x1p8f * scale;
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
