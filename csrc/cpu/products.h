// Products of a few tokens with rows of a matrix, for one instruction set.
//
// Included last by one file for each instruction set, which has set the compiler's target and has
// defined in an anonymous namespace
//   kWidth, F                    floats of a vector; the vector
//   kRegisters                   vector registers
//   fma(a, b, c)                 a * b + c
//   half<part>(const Float16*)   a part of a block of halves (see Wide), in order or not:
//   kHalvesInOrder
// A sum runs over K in the same order whatever the threads and the other tokens are.
#pragma once

#include <omp.h>

#include "isa.h"
#include "numbers.h"

namespace fusedpeft::cpu {
namespace {

typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedF __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t UnalignedU __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));

inline void meet() {
#pragma omp barrier
}

// --- vectors ------------------------------------------------------------------------------------

FUSEDPEFT_INLINE float sum(F v) {
  U lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
#pragma GCC unroll 4
  for (uint32_t half = kWidth / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
  return v[0];
}

// Lane i: the sum over v[i]'s lanes, in a third of the steps that kWidth times sum() takes.
template <int half = kWidth / 2>
FUSEDPEFT_INLINE F sums(F (&v)[kWidth]) {
  U keep, give;  // of a pair of vectors: one's lanes where lane & half is 0, else the other's
  for (uint32_t i = 0; i < kWidth; ++i) {
    const uint32_t other = i & half ? kWidth : 0;
    keep[i] = other + i;
    give[i] = other + (i ^ half);
  }
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + half], keep) + __builtin_shuffle(v[i], v[i + half], give);
  if constexpr (half > 1) {
    return sums<half / 2>(v);
  } else {
    return v[0];
  }
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
          __builtin_prefetch(ahead.from + n * sw * static_cast<int64_t>(sizeof *w) + line, 0,
                             MT == 1 ? 3 : 2);  // one token's rows are soon done: into the L1
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

  Tokens from(int64_t token) const { return {x + token * stride, m - token, k, stride}; }

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

// x for products with W and for products with A, which may be of another type.
template <class T, class PW, class PA>
struct Packings {
  static constexpr bool kOne = __is_same(PW, PA);
  static constexpr int64_t kBlocks = 4 * kWidth;  // a multiple of every kBlock
  static constexpr int64_t kPiece = 1024;         // elements that a thread packs at a time

  Tokens<PW> w;
  Tokens<PA> a;

  // A line more than needed: rows a power of two apart would fall into the same sets of the L1.
  static int64_t stride(int64_t k) { return round_up(k, kBlocks) + kLine / 4; }
  static int64_t floats(int64_t m, int64_t k) { return (kOne ? 1 : 2) * m * stride(k); }

  Packings(float* memory, int64_t m, int64_t k)
      : w{reinterpret_cast<typename PW::Packed*>(memory), m, k, stride(k)},
        a{reinterpret_cast<typename PA::Packed*>(memory + (kOne ? 0 : m * stride(k))), m, k,
          stride(k)} {}

  // A thread's share. from(m): where token m lies.
  template <class From>
  void pack(int64_t thread, int64_t team, From from) const {
    const int64_t pieces = ceil_div(w.k, kPiece), all = w.m * pieces;
    for (int64_t i = all * thread / team; i < all * (thread + 1) / team; ++i) {
      const int64_t token = i / pieces, begin = i % pieces * kPiece;
      const int64_t end = min_of(begin + kPiece, w.k);
      w.pack(token, from(token), begin, end);
      if constexpr (!kOne) a.pack(token, from(token), begin, end);
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

template <class P>
using Dot = void (*)(F*, bool, const typename P::Element*, int64_t, const typename P::Packed*,
                     int64_t, int64_t, Ahead);

template <class P, int MT, int NR>
Dot<P> dot_of(int rows) {
  if constexpr (NR > 1) {
    if (rows < NR) return dot_of<P, MT, NR - 1>(rows);
  }
  return dot<P, NR, MT>;
}

template <class P, int MT = kGroup>
Dot<P> dot_of(int rows, int tokens) {
  if constexpr (MT > 1) {
    if (tokens < MT) return dot_of<P, MT - 1>(rows, tokens);
  }
  return dot_of<P, MT, rows_for(MT)>(rows);
}

// As dot_rows, for groups of a size that is known only now and at most rows_for(it) rows. next: as
// many rows, fetched meanwhile; or null.
template <class P>
void dot_groups(F* acc, bool fresh, const typename P::Element* w, int64_t sw, int64_t rows,
                const Tokens<P>& x, const Groups& groups, const typename P::Element* next) {
  for (int g = 0; g < groups.count; ++g) {
    const int first = groups.begin(g), tokens = groups.size - (g < groups.larger ? 0 : 1);
    const Ahead ahead = {reinterpret_cast<const char*>(next ? next + x.k / groups.count * g : next),
                         next ? groups.count * kStep<P> / static_cast<int64_t>(sizeof *w) : x.k + 1};
    dot_of<P>(static_cast<int>(rows), tokens)(acc + first, fresh, w, sw, x.x + first * x.stride,
                                              x.stride, x.k, ahead);
  }
}

}  // namespace
}  // namespace fusedpeft::cpu
