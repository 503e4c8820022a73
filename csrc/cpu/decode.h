// y = x W^T + bias + scale * (x A^T) B^T for a few tokens, in one pass over W.
//
// Included last by one file for each instruction set, which has set the compiler's target and has
// defined in an anonymous namespace
//   kWidth, F                    floats of a vector; the vector
//   kRegisters                   vector registers
//   fma(a, b, c)                 a * b + c
//   half<part>(const Float16*)   a part of a block of halves (see Wide), in order or not:
//   kHalvesInOrder
//
// The order of work, S = scale * x A^T:
//   1. x is packed once (see Wide), split over the threads;
//   2. S[m, r], the rows of A split over the threads;
//   3. y, the rows of W split over the threads: a few rows at a time against a few tokens, then the
//      next tokens while these rows are in the cache and the next rows are on their way to it. When
//      the sums over K stand, [B | S] is a piece more of K.
// One parallel region; the threads meet after 1, and after 2 just before the first needs S. A sum
// runs over K in the same order whatever the threads and the other tokens are.
#pragma once

#include <omp.h>

#include "isa.h"
#include "numbers.h"

namespace fusedpeft::cpu {
namespace {

typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedF __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t UnalignedU __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));

// --- vectors ------------------------------------------------------------------------------------

FUSEDPEFT_INLINE float sum(F v) {
  U lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
#pragma GCC unroll 4
  for (uint32_t half = kWidth / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
  return v[0];
}

// A few bytes, an even number. The barriers: else the compiler calls memcpy, which takes longer.
FUSEDPEFT_INLINE void copy(void* to, const void* from, int64_t bytes) {
  auto* t = static_cast<char*>(to);
  auto* f = static_cast<const char*>(from);
  asm("" : "+r"(t));
  for (; bytes >= 16; bytes -= 16, t += 16, f += 16) {
    __builtin_memcpy(t, f, 16);
    asm("" : "+r"(f));
  }
  for (; bytes > 0; bytes -= 2, t += 2, f += 2) {
    __builtin_memcpy(t, f, 2);
    asm("" : "+r"(f));
  }
}

// How products with elements of T are done. A block is kBlock elements of a row, in the order that
// is cheapest to unpack into vectors; the tokens are packed by the same loads, so in the same order.
template <class T>
struct Wide {
  using Element = T;
  using Packed = float;
  static constexpr int kParts = 2, kBlock = 2 * kWidth;

  template <int part>
  static FUSEDPEFT_INLINE F load(const float* p) {
    return *reinterpret_cast<const UnalignedF*>(p + part * kWidth);
  }
  template <int part>
  static FUSEDPEFT_INLINE F load(const BFloat16* p) {  // the even elements, then the odd ones
    const U pairs = *reinterpret_cast<const UnalignedU*>(p);
    return reinterpret_cast<F>(part == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  template <int part>
  static FUSEDPEFT_INLINE F load(const Float16* p) {
    return half<part>(p);
  }
  static FUSEDPEFT_INLINE F mac(F w, F x, F acc) { return fma(w, x, acc); }

  static FUSEDPEFT_INLINE void pack(const T* from, float* to) {
    *reinterpret_cast<UnalignedF*>(to) = load<0>(from);
    *reinterpret_cast<UnalignedF*>(to + kWidth) = load<1>(from);
  }
};

// Where element i of a row goes when it is packed for a product with elements of T.
FUSEDPEFT_INLINE int64_t in_pairs(int64_t i) {
  const int64_t at = i % (2 * kWidth);
  return i - at + at % 2 * kWidth + at / 2;
}
FUSEDPEFT_INLINE int64_t packed_at(int64_t i, const float*) { return i; }
FUSEDPEFT_INLINE int64_t packed_at(int64_t i, const BFloat16*) { return in_pairs(i); }
FUSEDPEFT_INLINE int64_t packed_at(int64_t i, const Float16*) {
  return kHalvesInOrder ? i : in_pairs(i);
}

// --- products -----------------------------------------------------------------------------------

constexpr int kTokens = 16;                       // of one call
constexpr int kGroup = kRegisters >= 32 ? 6 : 4;  // tokens against which rows are held at once

// Rows at a time for a group of tokens: the sums, a vector of each row and one of x in registers.
constexpr int rows_for(int tokens) {
  const int fit = (kRegisters - 1) / (tokens + 1), most = kRegisters >= 32 ? 8 : 6;
  return fit < most ? fit : most;
}

template <class P, int part, int NR, int MT>
FUSEDPEFT_INLINE void dot_part(F (&sums)[NR][MT], const typename P::Element* w, int64_t sw,
                               const typename P::Packed* x, int64_t sx) {
  decltype(P::template load<part>(w)) row[NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n) row[n] = P::template load<part>(w + n * sw);
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    const auto token = P::template load<part>(x + m * sx);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) sums[n][m] = P::mac(row[n], token, sums[n][m]);
  }
}

template <class P, int NR, int MT>
FUSEDPEFT_INLINE void dot_block(F (&sums)[NR][MT], const typename P::Element* w, int64_t sw,
                                const typename P::Packed* x, int64_t sx) {
  dot_part<P, 0>(sums, w, sw, x, sx);
  if constexpr (P::kParts == 2) dot_part<P, 1>(sums, w, sw, x, sx);
}

// What to fetch while rows are multiplied: of rows like these, the bytes of a step from `from` on for
// every `every` elements of K. A step is whole lines of the cache and whole blocks.
struct Ahead {
  const char* from;
  int64_t every;
};
constexpr int kLine = 64;  // bytes
template <class P>
constexpr int kStep = P::kBlock * static_cast<int>(sizeof(typename P::Element)) > kLine
                          ? P::kBlock * static_cast<int>(sizeof(typename P::Element))
                          : kLine;

constexpr int64_t kLongSum = 2048;  // elements that one chain of sums takes: longer ones round worse

// acc[n, m] (+)= row n of w times token m, over k elements. acc: rows of kTokens vectors.
template <class P, int NR, int MT>
__attribute__((noinline)) void dot(F* acc, bool fresh, const typename P::Element* w, int64_t sw,
                                   const typename P::Packed* x, int64_t sx, int64_t k,
                                   Ahead ahead) {
  int64_t at = 0;
  do {
    F sums[NR][MT] = {};
    const int64_t stop = k - at > kLongSum ? at + kLongSum : k;
    for (; at + ahead.every <= stop; ahead.from += kStep<P>) {
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n)
#pragma GCC unroll 2
        for (int line = 0; line < kStep<P>; line += kLine)
          __builtin_prefetch(ahead.from + n * sw * static_cast<int64_t>(sizeof *w) + line, 0, 2);
      for (const int64_t end = at + ahead.every; at < end; at += P::kBlock)
        dot_block<P>(sums, w + at, sw, x + at, sx);
    }
    for (; at + P::kBlock <= stop; at += P::kBlock) dot_block<P>(sums, w + at, sw, x + at, sx);
    if (at < stop) {  // x is padded with zeros; what lies beyond a row of w is not ours to read
      typename P::Element edge[NR][P::kBlock] = {};
      for (int n = 0; n < NR; ++n)
        copy(edge[n], w + n * sw + at, (k - at) * static_cast<int64_t>(sizeof *w));
      dot_block<P>(sums, edge[0], P::kBlock, x + at, sx);
      at = stop;
    }

#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n)
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        F& out = acc[n * kTokens + m];
        out = fresh ? sums[n][m] : out + sums[n][m];
      }
    fresh = false;
  } while (at < k);
}

// The tokens of a call: the first `larger` groups have `size` of them, the others one less.
struct Groups {
  int count, size, larger;

  explicit Groups(int tokens)
      : count((tokens + kGroup - 1) / kGroup),
        size((tokens + count - 1) / count),
        larger(tokens - count * (size - 1)) {}
  int begin(int g) const { return g * size - (g > larger ? g - larger : 0); }
};

// Tokens in the order of P's blocks, padded with zeros to whole blocks.
template <class P>
struct Tokens {
  typename P::Packed* x;
  int64_t m, k, stride;

  // Elements begin..end (begin: a multiple of the block) of a token, from T: as they are where T is
  // P's, else each converted.
  template <class T>
  void pack(int64_t token, const T* from, int64_t begin, int64_t end) const {
    auto* to = x + token * stride;
    int64_t i = begin;
    if constexpr (__is_same(T, typename P::Element)) {
      for (; i + P::kBlock <= end; i += P::kBlock) P::pack(from + i, to + i);
      if (i == end) return;
      T edge[P::kBlock] = {};
      copy(edge, from + i, (end - i) * static_cast<int64_t>(sizeof(T)));
      P::pack(edge, to + i);
    } else {
      for (; i < end; ++i) to[i] = to_float(from[i]);
      for (; i % P::kBlock; ++i) to[i] = 0;
    }
  }
};

// acc[n, m] (+)= row n of w times token m for rows_for(G) rows or fewer, the largest group being G.
template <class P, int G>
FUSEDPEFT_INLINE void dot_rows(F* acc, bool fresh, const typename P::Element* w, int64_t sw,
                               int64_t rows, const Tokens<P>& x, const Groups& groups, bool ahead) {
  constexpr int NR = rows_for(G), L = G > 1 ? G - 1 : 1;
  for (int g = 0; g < groups.count; ++g) {
    const int first = groups.begin(g);
    const auto* tokens = x.x + first * x.stride;
    const bool large = g < groups.larger;
    if (rows == NR) {
      // Each group fetches its share of the next rows.
      const Ahead next = {reinterpret_cast<const char*>(w + NR * sw + x.k / groups.count * g),
                          ahead ? groups.count * kStep<P> / static_cast<int64_t>(sizeof *w) : x.k + 1};
      (large ? dot<P, NR, G> : dot<P, NR, L>)(acc + first, fresh, w, sw, tokens, x.stride, x.k, next);
    } else {
      for (int64_t n = 0; n < rows; ++n)
        (large ? dot<P, 1, G> : dot<P, 1, L>)(acc + n * kTokens + first, fresh, w + n * sw, sw,
                                              tokens, x.stride, x.k, {nullptr, x.k + 1});
    }
  }
}

// --- the call -----------------------------------------------------------------------------------

// x, w and y of T, adapters of TA; PW, PA: the products of x with w and with a; G: largest group.
template <class T, class TA, class PW, class PA, int G>
struct Call {
  using PB = Wide<TA>;
  static constexpr int kRows = rows_for(G);
  static constexpr bool kOnePacking = __is_same(PW, PA);
  static constexpr int64_t kBlocks = 4 * kWidth;  // a multiple of every kBlock
  static constexpr int64_t kPiece = 1024;         // elements that a thread packs at a time

  const Decode& d;
  const T *w, *bias;
  const TA *a, *b;
  Groups groups;
  Tokens<PW> xw;
  Tokens<PA> xa;
  Tokens<PB> s;

  explicit Call(const Decode& d)
      : d(d),
        w(static_cast<const T*>(d.w)),
        bias(static_cast<const T*>(d.bias)),
        a(static_cast<const TA*>(d.a)),
        b(static_cast<const TA*>(d.b)),
        groups(static_cast<int>(d.m)) {
    // A line more than needed: rows a power of two apart would fall into the same sets of the L1.
    const int64_t sx = round_up(d.k, kBlocks) + kLine / 4, ss = round_up(d.r, kBlocks);
    const int64_t floats = d.m * (ss + (kOnePacking ? 1 : 2) * sx);
    float* memory = static_cast<float*>(scratch(floats * sizeof(float)));
    s = {memory, d.m, d.r, ss};
    for (int64_t i = 0; i < d.m * ss; ++i) memory[i] = 0;
    memory += d.m * ss;
    xw = {reinterpret_cast<typename PW::Packed*>(memory), d.m, d.k, sx};
    if constexpr (kOnePacking) {
      xa = xw;
    } else {
      xa = {reinterpret_cast<typename PA::Packed*>(memory + d.m * sx), d.m, d.k, sx};
    }
  }

  void pack(int64_t thread, int64_t team) const {
    const int64_t pieces = ceil_div(d.k, kPiece), all = d.m * pieces;
    for (int64_t i = all * thread / team; i < all * (thread + 1) / team; ++i) {
      const int64_t token = i / pieces, begin = i % pieces * kPiece;
      const int64_t end = min_of(begin + kPiece, d.k);
      const T* from = static_cast<const T*>(d.x) + token * d.sx;
      xw.pack(token, from, begin, end);
      if constexpr (!kOnePacking) xa.pack(token, from, begin, end);
    }
  }

  void shrink(int64_t begin, int64_t end) const {
    F acc[kRows * kTokens];
    for (int64_t r = begin; r < end; r += kRows) {
      const int64_t rows = min_of(kRows, end - r);
      dot_rows<PA, G>(acc, true, a + r * d.sa, d.sa, rows, xa, groups, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t m = 0; m < d.m; ++m)
          s.x[m * s.stride + packed_at(r + i, a)] = d.scale * sum(acc[i * kTokens + m]);
    }
  }

  // ready() returns when S stands.
  template <class Ready>
  void expand(int64_t begin, int64_t end, Ready ready) const {
    F acc[kRows * kTokens];
    if (begin >= end) ready();
    for (int64_t n = begin; n < end; n += kRows) {
      const int64_t rows = min_of(kRows, end - n);
      dot_rows<PW, G>(acc, true, w + n * d.sw, d.sw, rows, xw, groups, true);
      if (n == begin) ready();
      dot_rows<PB, G>(acc, false, b + n * d.sb, d.sb, rows, s, groups, false);
      for (int64_t i = n; i < n + rows; ++i) {
        const float c = bias ? to_float(bias[i]) : 0.0f;
        for (int64_t m = 0; m < d.m; ++m)
          from_float(sum(acc[(i - n) * kTokens + m]) + c, static_cast<T*>(d.y) + m * d.sy + i);
      }
    }
  }

  static void meet() {
#pragma omp barrier
  }

  void run() const {
    // A core does some 2^16 products with W while another wakes up.
    const int64_t worth = d.n * d.k * (d.m + 3) / 4 >> 16;
    const int threads = static_cast<int>(min_of(omp_get_max_threads(), worth));
    if (threads <= 1) {
      pack(0, 1);
      shrink(0, d.r);
      expand(0, d.n, [] {});
      return;
    }
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      pack(thread, team);
      meet();
      shrink(d.r * thread / team, d.r * (thread + 1) / team);
      const int64_t blocks = d.n / kRows;
      expand(blocks * thread / team * kRows,
             thread + 1 < team ? blocks * (thread + 1) / team * kRows : d.n, meet);
    }
  }
};

template <class T, class TA, class PW, class PA>
void decode_as(const Decode& d) {
  switch (Groups(static_cast<int>(d.m)).size) {
    case 1: return Call<T, TA, PW, PA, 1>(d).run();
    case 2: return Call<T, TA, PW, PA, 2>(d).run();
    case 3: return Call<T, TA, PW, PA, 3>(d).run();
    case 4: return Call<T, TA, PW, PA, 4>(d).run();
    case 5: return Call<T, TA, PW, PA, kGroup < 5 ? 1 : 5>(d).run();
    default: return Call<T, TA, PW, PA, kGroup < 6 ? 1 : 6>(d).run();
  }
}

template <class T>
void decode_wide(const Decode& d) {
  if (d.adapter_dtype == d.dtype) return decode_as<T, T, Wide<T>, Wide<T>>(d);
  if constexpr (sizeof(T) == 2) return decode_as<T, float, Wide<T>, Wide<float>>(d);
}

inline void decode_any(const Decode& d) {
  if (d.dtype == kFloat32) return decode_wide<float>(d);
  if (d.dtype == kBFloat16) return decode_wide<BFloat16>(d);
  return decode_wide<Float16>(d);
}

}  // namespace
}  // namespace fusedpeft::cpu
