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
//   1. x is packed once, in tiles of K that stay in the L1 cache, split over the threads;
//   2. S[m, r], the rows of A split over the threads;
//   3. y, the rows of W split over the threads, a few rows at a time against a group of tokens.
//      When the sums of a block over K stand, [B | S] is one more tile of K.
// One parallel region; the threads meet after 1, and after 2 just before the first needs S.
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
  float lanes[kWidth];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
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

constexpr int kTokens = 16;  // of one pass
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

// acc[n, m] (+)= row n of w times token m over k elements. acc: rows of kTokens vectors.
template <class P, int NR, int MT>
__attribute__((noinline)) void dot(F* acc, bool fresh, const typename P::Element* w, int64_t sw,
                                   const typename P::Packed* x, int64_t sx, int64_t k) {
  F sums[NR][MT];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) sums[n][m] = fresh ? F{} : acc[n * kTokens + m];

  int64_t at = 0;
  for (; at + P::kBlock <= k; at += P::kBlock) dot_block<P>(sums, w + at, sw, x + at, sx);
  if (at < k) {  // x is padded with zeros; what lies beyond a row of w is not ours to read
    typename P::Element edge[NR][P::kBlock] = {};
    for (int n = 0; n < NR; ++n)
      for (int64_t i = at; i < k; ++i) edge[n][i - at] = w[n * sw + i];
    dot_block<P>(sums, edge[0], P::kBlock, x + at, sx);
  }

#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) acc[n * kTokens + m] = sums[n][m];
}

// `rows` rows of w against a group of G or G - 1 tokens.
template <class P, int G>
FUSEDPEFT_INLINE void dot_rows(F* acc, bool fresh, const typename P::Element* w, int64_t sw,
                               int64_t rows, const typename P::Packed* x, int64_t sx, int tokens,
                               int64_t k) {
  constexpr int NR = rows_for(G), L = G > 1 ? G - 1 : 1;
  const auto many = tokens == G ? dot<P, NR, G> : dot<P, NR, L>;
  const auto one = tokens == G ? dot<P, 1, G> : dot<P, 1, L>;
  int64_t n = 0;
  for (; n + NR <= rows; n += NR) many(acc + n * kTokens, fresh, w + n * sw, sw, x, sx, k);
  for (; n < rows; ++n) one(acc + n * kTokens, fresh, w + n * sw, sw, x, sx, k);
}

// The tokens of a pass: `groups` groups, the first `larger` of them of G and the others of G - 1.
struct Groups {
  int m, groups, size, larger;
  explicit Groups(int m)
      : m(m), groups((m + kGroup - 1) / kGroup), size((m + groups - 1) / groups),
        larger(m - groups * (size - 1)) {}
  int begin(int g) const { return g * size - (g > larger ? g - larger : 0); }
  int count(int g) const { return size - (g >= larger); }
};

// Packed tokens: tile after tile of k_tile elements (a multiple of every kBlock), m rows in each.
template <class P>
struct Packed {
  typename P::Packed* x;
  int64_t m, k, k_tile;

  int64_t tiles() const { return ceil_div(k, k_tile); }
  typename P::Packed* row(int64_t tile, int64_t token) const {
    return x + (tile * m + token) * k_tile;
  }
  int64_t count(int64_t tile) const { return min_of(k_tile, k - tile * k_tile); }

  // Row `token` of the tile, from elements of T: the same as those of P, or converted one by one.
  template <class T>
  void pack(int64_t tile, int64_t token, const T* from) const {
    const int64_t n = count(tile);
    auto* to = row(tile, token);
    if constexpr (__is_same(T, typename P::Element)) {
      int64_t i = 0;
      for (; i + P::kBlock <= n; i += P::kBlock) P::pack(from + i, to + i);
      if (i < n) {
        T edge[P::kBlock] = {};
        for (int64_t j = i; j < n; ++j) edge[j - i] = from[j];
        P::pack(edge, to + i);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
      for (int64_t i = n; i < round_up(n, P::kBlock); ++i) to[i] = 0;
    }
  }
};

// acc[n, m] = row n of w times token m, all of K.
template <class P, int G>
void dot_tiles(F* acc, const typename P::Element* w, int64_t sw, int64_t rows, Packed<P> x,
               const Groups& groups) {
  for (int64_t t = 0; t < x.tiles(); ++t)
    for (int g = 0; g < groups.groups; ++g)
      dot_rows<P, G>(acc + groups.begin(g), t == 0, w + t * x.k_tile, sw, rows,
                     x.row(t, groups.begin(g)), x.k_tile, groups.count(g), x.count(t));
}

constexpr int kMaxChunk = 24;  // rows of W that pass over one tile of x before the next tile

// x, w and y of T, adapters of TA; PW, PA: the products of x with w and with a.
template <class T, class TA, class PW, class PA, int G>
struct Pass {
  static constexpr int kRows = rows_for(G);
  static constexpr int kChunk = kMaxChunk / kRows * kRows;
  static constexpr bool kOnePacking = __is_same(PW, PA);
  using PB = Wide<TA>;

  const Decode& d;
  Groups groups;
  Packed<PW> xw;
  Packed<PA> xa;
  Packed<PB> s;

  explicit Pass(const Decode& d) : d(d), groups(static_cast<int>(d.m)) {
    constexpr int64_t step = 4 * kWidth;  // a multiple of the blocks of all products
    const int64_t k_pad = round_up(d.k, step), r_pad = round_up(d.r, step);
    const int64_t k_tile = groups.groups == 1 ? k_pad : min_of(k_pad, 512);
    const int64_t elements = ceil_div(k_pad, k_tile) * k_tile * d.m;
    char* memory = static_cast<char*>(
        scratch(elements * ((kOnePacking ? 0 : sizeof(*xa.x)) + sizeof(*xw.x)) +
                r_pad * d.m * sizeof(float)));
    s = {reinterpret_cast<float*>(memory), d.m, d.r, r_pad};
    memory += r_pad * d.m * sizeof(float);
    xw = {reinterpret_cast<typename PW::Packed*>(memory), d.m, d.k, k_tile};
    memory += elements * sizeof(*xw.x);
    if constexpr (kOnePacking) {
      xa = xw;
    } else {
      xa = {reinterpret_cast<typename PA::Packed*>(memory), d.m, d.k, k_tile};
    }
    for (int64_t i = 0; i < r_pad * d.m; ++i) s.x[i] = 0;
  }

  void pack(int64_t thread, int64_t threads) const {
    const int64_t rows = xw.tiles() * d.m;
    for (int64_t i = rows * thread / threads; i < rows * (thread + 1) / threads; ++i) {
      const int64_t tile = i / d.m, token = i % d.m;
      const T* from = static_cast<const T*>(d.x) + token * d.sx + tile * xw.k_tile;
      xw.pack(tile, token, from);
      if constexpr (!kOnePacking) xa.pack(tile, token, from);
    }
  }

  void shrink(int64_t r0, int64_t r1) const {
    F acc[kChunk * kTokens];
    for (int64_t r = r0; r < r1; r += kChunk) {
      const int64_t rows = min_of(kChunk, r1 - r);
      dot_tiles<PA, G>(acc, static_cast<const TA*>(d.a) + r * d.sa, d.sa, rows, xa, groups);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t m = 0; m < d.m; ++m)
          s.row(0, m)[packed_at(r + i, static_cast<const TA*>(nullptr))] =
              d.scale * sum(acc[i * kTokens + m]);
    }
  }

  static void meet() {
#pragma omp barrier
  }

  // ready() returns when S stands.
  template <class Ready>
  void expand(int64_t n0, int64_t n1, Ready ready) const {
    F acc[kChunk * kTokens];
    const int64_t chunk = xw.tiles() == 1 ? kRows : kChunk;
    if (n0 >= n1) ready();
    for (int64_t n = n0; n < n1; n += chunk) {
      const int64_t rows = min_of(chunk, n1 - n);
      dot_tiles<PW, G>(acc, static_cast<const T*>(d.w) + n * d.sw, d.sw, rows, xw, groups);
      if (n == n0) ready();
      for (int g = 0; g < groups.groups; ++g)
        dot_rows<PB, G>(acc + groups.begin(g), false, static_cast<const TA*>(d.b) + n * d.sb, d.sb,
                        rows, s.row(0, groups.begin(g)), s.k_tile, groups.count(g), d.r);
      for (int64_t i = 0; i < rows; ++i) {
        const float bias = d.bias ? to_float(static_cast<const T*>(d.bias)[n + i]) : 0.0f;
        for (int64_t m = 0; m < d.m; ++m)
          from_float(sum(acc[i * kTokens + m]) + bias, static_cast<T*>(d.y) + m * d.sy + n + i);
      }
    }
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
#pragma omp barrier
      shrink(d.r * thread / team, d.r * (thread + 1) / team);
      const int64_t blocks = d.n / kRows;
      expand(blocks * thread / team * kRows,
             thread + 1 == team ? d.n : blocks * (thread + 1) / team * kRows, meet);
    }
  }
};

template <class T, class TA, class PW, class PA>
void decode_as(const Decode& d) {
  switch (Groups(static_cast<int>(d.m)).size) {
    case 1: return Pass<T, TA, PW, PA, 1>(d).run();
    case 2: return Pass<T, TA, PW, PA, 2>(d).run();
    case 3: return Pass<T, TA, PW, PA, 3>(d).run();
    case 4: return Pass<T, TA, PW, PA, 4>(d).run();
    case 5: return Pass<T, TA, PW, PA, kGroup < 5 ? 1 : 5>(d).run();
    default: return Pass<T, TA, PW, PA, kGroup < 6 ? 1 : 6>(d).run();
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
