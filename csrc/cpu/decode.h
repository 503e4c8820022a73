// y = x W^T + bias + scale * (x A^T) B^T for a few tokens, in one pass over W: see products.h.
//
// The order of work, S = scale * x A^T:
//   1. x is packed once (see Wide), split over the threads;
//   2. S[m, r], the rows of A split over the threads;
//   3. y, the rows of W split over the threads: a few rows at a time against a few tokens, then the
//      next tokens while these rows are in the cache and the next rows are on their way to it. When
//      the sums over K stand, [B | S] is a piece more of K.
// One parallel region; the threads meet after 1, and after 2 just before the first needs S.
#pragma once

#include "products.h"

namespace fusedpeft::cpu {
namespace {

// --- the call -----------------------------------------------------------------------------------

// W as Call takes it: rows of T in memory.
template <class T>
struct Dense {
  const T* w;
  int64_t stride;

  // acc[i, m] = row n + i times token m.
  template <class P, int G>
  FUSEDPEFT_INLINE void products(F* acc, int64_t n, int64_t rows, const Tokens<P>& x,
                                 const Groups& groups) const {
    dot_rows<P, G>(acc, true, w + n * stride, stride, rows, x, groups, true);
  }
};

// x and y of T, adapters of TA; PW, PA: the products of x with W and with a; G: largest group.
template <class T, class TA, class PW, class PA, int G, class W>
struct Call {
  using PB = Wide<TA>;
  static constexpr int kRows = rows_for(G);

  const Decode& d;
  const W w;
  const T* bias;
  const TA *a, *b;
  Groups groups;
  Tokens<PB> s;
  Packings<T, PW, PA> x;

  Call(const Decode& d, const W& w)
      : d(d),
        w(w),
        bias(static_cast<const T*>(d.bias)),
        a(static_cast<const TA*>(d.a)),
        b(static_cast<const TA*>(d.b)),
        groups(static_cast<int>(d.m)),
        s(sums_of(d)),
        x(s.x + d.m * s.stride, d.m, d.k) {}

  static Tokens<PB> sums_of(const Decode& d) {
    const int64_t stride = round_up(d.r, Packings<T, PW, PA>::kBlocks), floats = d.m * stride;
    const int64_t all = floats + Packings<T, PW, PA>::floats(d.m, d.k);
    float* s = static_cast<float*>(scratch(all * static_cast<int64_t>(sizeof(float))));
    for (int64_t i = 0; i < floats; ++i) s[i] = 0;
    return {s, d.m, d.r, stride};
  }

  void pack(int64_t thread, int64_t team) const {
    x.pack(thread, team, [&](int64_t m) { return static_cast<const T*>(d.x) + m * d.sx; });
  }

  void shrink(int64_t begin, int64_t end) const {
    F acc[kRows * kTokens];
    for (int64_t r = begin; r < end; r += kRows) {
      const int64_t rows = min_of(kRows, end - r);
      dot_rows<PA, G>(acc, true, a + r * d.sa, d.sa, rows, x.a, groups, false);
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
      w.template products<PW, G>(acc, n, rows, x.w, groups);
      if (n == begin) ready();
      dot_rows<PB, G>(acc, false, b + n * d.sb, d.sb, rows, s, groups, false);
      for (int64_t i = n; i < n + rows; ++i) {
        const float c = bias ? to_float(bias[i]) : 0.0f;
        for (int64_t m = 0; m < d.m; ++m)
          from_float(sum(acc[(i - n) * kTokens + m]) + c, static_cast<T*>(d.y) + m * d.sy + i);
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
      meet();
      shrink(d.r * thread / team, d.r * (thread + 1) / team);
      const int64_t blocks = d.n / kRows;
      expand(blocks * thread / team * kRows,
             thread + 1 < team ? blocks * (thread + 1) / team * kRows : d.n, meet);
    }
  }
};

template <class T, class TA, class PW, class PA, class W>
void decode_as(const Decode& d, const W& w) {
  switch (Groups(static_cast<int>(d.m)).size) {
    case 1: return Call<T, TA, PW, PA, 1, W>(d, w).run();
    case 2: return Call<T, TA, PW, PA, 2, W>(d, w).run();
    case 3: return Call<T, TA, PW, PA, 3, W>(d, w).run();
    case 4: return Call<T, TA, PW, PA, 4, W>(d, w).run();
    case 5: return Call<T, TA, PW, PA, kGroup < 5 ? 1 : 5, W>(d, w).run();
    default: return Call<T, TA, PW, PA, kGroup < 6 ? 1 : 6, W>(d, w).run();
  }
}

template <class T, class TA, class PW, class PA>
void decode_as(const Decode& d) {
  decode_as<T, TA, PW, PA>(d, Dense<T>{static_cast<const T*>(d.w), d.sw});
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
