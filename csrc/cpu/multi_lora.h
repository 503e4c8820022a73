// y[m] = W x[m] + bias + scale * B (A x[m]), A and B of the slot that token m names: one pass over W.
//
// Tokens are taken in the order of their slots, so that those that share one share the reads of its
// A and B, in batches whose sums are held at once. The order of work, S = scale * A x:
//   1. x is packed once (see Wide), split over the threads;
//   2. S, the rows of all A split over the threads;
//   3. y, the rows of W split over the threads: a tile of them against each batch, a few rows at a
//      time against a few tokens, while the next rows and the tile's rows of B are on their way to
//      the cache; then the rows of B against S.
// One parallel region; the threads meet after 1, and after 2 just before the first needs S. A sum
// runs over K and R in the same order whatever the threads and the other tokens are.
#pragma once

#include "products.h"

namespace fusedpeft::cpu {
namespace {

// Products with short rows, not packed: whole vectors of them are whole steps of a row of B.
template <class T>
struct InOrder {
  using Element = T;
  using Packed = float;
  static constexpr int kParts = 1, kBlock = kWidth;
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

  template <int>
  static FUSEDPEFT_INLINE F load(const float* p) {
    return *reinterpret_cast<const UnalignedF*>(p);
  }
  template <int>
  static FUSEDPEFT_INLINE F load(const BFloat16* p) {
    const Halves halves = *reinterpret_cast<const Halves*>(p);
    return reinterpret_cast<F>(__builtin_convertvector(halves, U) << 16);
  }
  template <int>
  static FUSEDPEFT_INLINE F load(const Float16* p) {
    if constexpr (kHalvesInOrder) return half<0>(p);
    F v;
    for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
    return v;
  }
  static FUSEDPEFT_INLINE F mac(F w, F x, F acc) { return fma(w, x, acc); }
};

// x, w and y of T, adapters of TA; PW, PA: the products of x with w and with a.
template <class T, class TA, class PW, class PA>
struct MultiCall {
  using PB = InOrder<TA>;
  static constexpr int64_t kSplit = kWidth;               // a thread's rows are multiples of it
  static constexpr int64_t kTile = round_up(24, kWidth);  // rows whose sums are held
  static constexpr int64_t kTileBytes = 1 << 17;          // of W, where several batches read it

  const MultiLora& d;
  const T *w, *bias;
  float* s;
  Packings<T, PW, PA> x;

  // extra: floats behind all others, for who builds on this.
  explicit MultiCall(const MultiLora& d, int64_t extra = 0)
      : d(d),
        w(static_cast<const T*>(d.w)),
        bias(static_cast<const T*>(d.bias)),
        s(static_cast<float*>(scratch((d.s_size + x.floats(d.m, d.k) + extra) * sizeof(float)))),
        x(s + d.s_size, d.m, d.k) {
    for (int64_t i = 0; i < d.s_size; ++i) s[i] = 0;
  }

  void pack(int64_t thread, int64_t team) const {
    x.pack(thread, team, [&](int64_t m) { return static_cast<const T*>(d.x) + d.order[m] * d.sx; });
  }

  // Rows of A at a time: ranks are multiples of 8 more often than of 6.
  static int step(const Groups& groups) { return static_cast<int>(min_of(4, rows_for(groups.size))); }

  void shrink(int64_t thread, int64_t team) const {
    shrink(thread, team, [&](const LoraPart& p, int64_t m, int64_t r, float v) {
      s[p.s + m * p.stride + r] = v;
    });
  }

  // put(part, token of it, rank, element of S) for a thread's share.
  template <class Put>
  void shrink(int64_t thread, int64_t team, Put put) const {
    const LoraPart* last = d.parts + d.part_count;
    int64_t all = 0;
    for (const LoraPart* p = d.parts; p < last; ++p)
      all += ceil_div(p->rank, step(Groups(p->end - p->begin)));
    const int64_t begin = all * thread / team, end = all * (thread + 1) / team;
    F acc[4 * kTokens];
    int64_t at = 0;
    for (const LoraPart* p = d.parts; p < last && at < end; ++p) {
      const Groups groups(p->end - p->begin);
      const int64_t few = step(groups), steps = ceil_div(p->rank, few);
      const Tokens<PA> tokens = x.a.from(p->begin);
      const TA* a = static_cast<const TA*>(p->a);
      for (int64_t i = begin > at ? begin - at : 0; i < steps && at + i < end; ++i) {
        const int64_t r = i * few, rows = min_of(few, p->rank - r);
        const TA* next = i + 1 < steps ? a + (r + few) * d.sa
                         : p + 1 < last ? static_cast<const TA*>(p[1].a)
                                        : nullptr;
        dot_groups<PA>(acc, true, a + r * d.sa, d.sa, rows, tokens, groups, next);
        for (int64_t q = 0; q < rows; ++q)
          for (int64_t m = 0; m < p->end - p->begin; ++m)
            put(*p, m, r + q, p->scale * sum(acc[q * kTokens + m]));
      }
      at += steps;
    }
  }

  // Rows of B, once for each batch, on their way to the cache.
  void fetch(const LoraPart& p, int64_t from, int64_t to) const {
    const char* b = static_cast<const char*>(p.b);
    const int64_t row = p.sb * static_cast<int64_t>(sizeof(TA));
    for (int64_t at = (from - p.first) * row; at < (to - p.first) * row; at += kLine)
      __builtin_prefetch(b + at, 0, 2);
  }

  // Calls fn(part, first, last) for the rows of W in [n, end) that a part of the batch is added to.
  template <class Fn>
  void each_part(const Batch& batch, int64_t n, int64_t end, Fn fn) const {
    for (int64_t i = batch.first_part; i < batch.last_part; ++i) {
      const LoraPart& p = d.parts[i];
      const int64_t from = n > p.first ? n : p.first, to = min_of(end, p.first + p.rows);
      if (from < to) fn(p, from, to);
    }
  }

  // ready() returns when S stands.
  template <class Ready>
  void expand(int64_t begin, int64_t end, Ready ready) const {
    F acc[kTile * kTokens];
    const int64_t few = rows_for(Groups(d.batches->end - d.batches->begin).size);
    int64_t tile = kTile / few * few;
    if (d.batch_count > 1) {
      const int64_t fit = kTileBytes / (d.k + 1) / static_cast<int64_t>(sizeof *w) / few * few;
      tile = fit < few ? few : min_of(tile, fit);
    }
    if (begin >= end) ready();
    for (int64_t n = begin; n < end; n += tile) {
      const int64_t stop = min_of(n + tile, end);
      for (const Batch* batch = d.batches; batch < d.batches + d.batch_count; ++batch) {
        each_part(*batch, n, stop,
                  [&](const LoraPart& p, int64_t from, int64_t to) { fetch(p, from, to); });
        base(acc, *batch, n, stop, batch == d.batches);
        if (n == begin && batch == d.batches) ready();
        each_part(*batch, n, stop, [&](const LoraPart& p, int64_t from, int64_t to) {
          update(acc + (from - n) * kTokens + p.column, p, from, to);
        });
        store(acc, *batch, n, stop);
      }
    }
  }

  void base(F* acc, const Batch& batch, int64_t n, int64_t end, bool ahead) const {
    const Groups groups(batch.end - batch.begin);
    const Tokens<PW> tokens = x.w.from(batch.begin);
    const int64_t few = rows_for(groups.size);
    for (int64_t i = n; i < end; i += few) {
      const int64_t rows = min_of(few, end - i);
      dot_groups<PW>(acc + (i - n) * kTokens, true, w + i * d.sw, d.sw, rows, tokens, groups,
                     ahead ? w + (i + rows) * d.sw : nullptr);
    }
  }

  void update(F* acc, const LoraPart& p, int64_t from, int64_t to) const {
    const Groups groups(p.end - p.begin);
    const Tokens<PB> tokens = {s + p.s, p.end - p.begin, p.sb, p.stride};
    const TA* b = static_cast<const TA*>(p.b) + (from - p.first) * p.sb;
    const int64_t few = rows_for(groups.size);
    for (int64_t i = 0; i < to - from; i += few)
      dot_groups<PB>(acc + i * kTokens, false, b + i * p.sb, p.sb, min_of(few, to - from - i), tokens,
                     groups, nullptr);
  }

  void store(const F* acc, const Batch& batch, int64_t n, int64_t end) const {
    for (int64_t i = n; i < end; i += kWidth) {
      const int64_t rows = min_of(kWidth, end - i);
      F c = {};
      for (int64_t j = 0; bias && j < rows; ++j) c[j] = to_float(bias[i + j]);
      for (int64_t m = 0; m < batch.end - batch.begin; ++m) {
        F v[kWidth];
        for (int64_t j = 0; j < kWidth; ++j) v[j] = acc[(i - n + j) * kTokens + m];
        const F y = sums(v) + c;
        T* to = static_cast<T*>(d.y) + d.order[batch.begin + m] * d.sy + i;
        for (int64_t j = 0; j < rows; ++j) from_float(y[j], to + j);
      }
    }
  }
};

template <class Call>
void run_multi(const Call& call) {
  const MultiLora& d = call.d;
  // A core does some 2^16 products with W while another wakes up.
  const int64_t worth = d.n * d.k * (d.m + 3) / 4 >> 16;
  const int threads = static_cast<int>(min_of(omp_get_max_threads(), worth));
  if (threads <= 1) {
    call.pack(0, 1);
    call.shrink(0, 1);
    call.expand(0, d.n, [] {});
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    call.pack(thread, team);
    meet();
    call.shrink(thread, team);
    const int64_t blocks = d.n / Call::kSplit;
    call.expand(blocks * thread / team * Call::kSplit,
                thread + 1 < team ? blocks * (thread + 1) / team * Call::kSplit : d.n, meet);
  }
}

template <class T>
void multi_wide(const MultiLora& d) {
  if (d.adapter_dtype == d.dtype) return run_multi(MultiCall<T, T, Wide<T>, Wide<T>>(d));
  if constexpr (sizeof(T) == 2) return run_multi(MultiCall<T, float, Wide<T>, Wide<float>>(d));
}

inline void multi_any(const MultiLora& d) {
  if (d.dtype == kFloat32) return multi_wide<float>(d);
  if (d.dtype == kBFloat16) return multi_wide<BFloat16>(d);
  return multi_wide<Float16>(d);
}

}  // namespace
}  // namespace fusedpeft::cpu
