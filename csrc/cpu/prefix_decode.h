// Attention of a few query tokens over a prefix that requests share and over keys of their own.
//
// Included by one file for each instruction set. prefix_decode.cpp has made the plan:
// items, each the queries of some requests against a chunk of the keys that they all see (of a
// prefix, or of the one request's own). An item leaves for each of its queries a record: the sums
// over its chunk of e^(s - m) v and of e^(s - m), and m, the largest score. When all stand, the
// records of a query are added in the order of the chunks. One parallel region; what a chunk is
// depends on the sizes alone, so the bits depend on neither threads nor neighbours.
//
// Queries, records and gathered keys are in the order of Wide<E>'s blocks, padded with zeros.
#pragma once

#include "functions.h"

namespace fusedpeft::cpu {
namespace {

constexpr int kTile = 32;  // keys whose scores stand at a time; a multiple of kWidth
constexpr float kLowest = -__builtin_inff();

// Lane i: the sum of v[i]. At each step a pair of vectors becomes one that holds half of each.
FUSEDPEFT_INLINE F lane_sums(F (&v)[kWidth]) {
#pragma GCC unroll 4
  for (uint32_t half = kWidth / 2; half > 0; half /= 2) {
    U mine, other;  // of (a, b): lanes of a where the bit is clear, of b where it is set
    for (uint32_t i = 0; i < kWidth; ++i) {
      mine[i] = i & half ? kWidth + (i ^ half) : i;
      other[i] = i & half ? kWidth + i : i ^ half;
    }
#pragma GCC unroll 8
    for (uint32_t i = 0; i < half; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + half], mine) +
             __builtin_shuffle(v[i], v[i + half], other);
  }
  return v[0];
}

// q times each of kWidth keys.
template <class X>
FUSEDPEFT_INLINE F dots(const X* k, int64_t sk, const float* q, int64_t d) {
  F sums[kWidth] = {};
  for (int64_t i = 0; i < d; i += Wide<X>::kBlock) {
    const F x0 = at(q + i), x1 = at(q + i + kWidth);
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n)
      sums[n] = fma(Wide<X>::template load<0>(k + n * sk + i), x0, sums[n]);
#pragma GCC unroll 16
    for (int n = 0; n < kWidth; ++n)
      sums[n] = fma(Wide<X>::template load<1>(k + n * sk + i), x1, sums[n]);
  }
  return lane_sums(sums);
}

// sums += weights[j] v[j] over the keys, in N blocks of columns.
template <int N, class X>
FUSEDPEFT_INLINE void add_columns(float* sums, const float* weights, const X* v, int64_t sv,
                                  int64_t keys) {
  constexpr int kBlock = Wide<X>::kBlock;
  F acc[2 * N];
#pragma GCC unroll 8
  for (int n = 0; n < 2 * N; ++n) acc[n] = at(sums + n * kWidth);
  for (int64_t j = 0; j < keys; ++j) {
    const F weight = all(weights[j]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      acc[2 * n] = fma(Wide<X>::template load<0>(v + j * sv + n * kBlock), weight, acc[2 * n]);
      acc[2 * n + 1] =
          fma(Wide<X>::template load<1>(v + j * sv + n * kBlock), weight, acc[2 * n + 1]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < 2 * N; ++n) put(acc[n], sums + n * kWidth);
}

template <class X>
FUSEDPEFT_INLINE void add_values(float* sums, const float* weights, const X* v, int64_t sv,
                                 int64_t keys, int64_t d) {
  constexpr int kBlock = Wide<X>::kBlock;
  int64_t i = 0;
  for (; i + 4 * kBlock <= d; i += 4 * kBlock) add_columns<4>(sums + i, weights, v + i, sv, keys);
  for (; i + 2 * kBlock <= d; i += 2 * kBlock) add_columns<2>(sums + i, weights, v + i, sv, keys);
  for (; i < d; i += kBlock) add_columns<1>(sums + i, weights, v + i, sv, keys);
}

// E: the elements of q, k, v and out.
template <class E>
struct Attend {
  const PrefixDecode& d;
  const int64_t padded = round_up(d.d, Wide<E>::kBlock), record = padded + kLine / 4;
  float* records;
  float* memory;  // of the threads, `own` floats each
  const int64_t own;

  struct Room {  // of a thread
    float *q, *scores;    // [most, padded], [most, kTile]
    float *keys, *values;  // [kTile, padded], gathered
  };

  explicit Attend(const PrefixDecode& d, int threads)
      : d(d), own(d.most * (padded + kTile) + 2 * kTile * padded) {
    const int64_t floats = d.first[d.b] * d.hkv * d.rows * record;
    records = static_cast<float*>(scratch((floats + threads * own) * sizeof(float)));
    memory = records + floats;
  }

  Room room(int64_t thread) const {
    float* q = memory + thread * own;
    float* scores = q + d.most * padded;
    float* keys = scores + d.most * kTile;
    return {q, scores, keys, keys + kTile * padded};
  }
  // Of query i of a request's `rows`, in that part of the request.
  float* record_of(int64_t part, int64_t h, int64_t i) const {
    return records + ((part * d.hkv + h) * d.rows + i) * record;
  }
  float& largest(float* rec) const { return rec[padded]; }
  float& total(float* rec) const { return rec[padded + 1]; }

  // Scores s of keys begin.. become weights; a record whose maximum was smaller is scaled down.
  // low, high: the keys that the query sees.
  void weigh(float* s, float* rec, int64_t keys, int64_t low, int64_t high) const {
    const int64_t stop = round_up(keys, kWidth);
    for (int64_t j = 0; j < min_of(low, stop); ++j) s[j] = kLowest;
    for (int64_t j = high > 0 ? high : 0; j < stop; ++j) s[j] = kLowest;
    F best = at(s);
    for (int64_t j = kWidth; j < stop; j += kWidth) best = at(s + j) > best ? at(s + j) : best;
    float top = largest(rec);
    for (int n = 0; n < kWidth; ++n) top = best[n] > top ? best[n] : top;
    const float shift = top == kLowest ? 0.0f : top;
    if (top > largest(rec)) {
      const float less = exp_of(largest(rec) - shift);
      for (int64_t j = 0; j < padded; j += kWidth) put(at(rec + j) * less, rec + j);
      total(rec) *= less;
      largest(rec) = top;
    }
    F weights = {};
    for (int64_t j = 0; j < stop; j += kWidth) {
      const F w = exp_of(at(s + j) - shift);
      put(w, s + j);
      weights += w;
    }
    total(rec) += sum(weights);
  }

  // Keys begin.. begin + keys, from k and v on; k has whole vectors of keys.
  template <class X>
  __attribute__((noinline)) void tile(const Room& room, const PrefixItem& item, int64_t h,
                                      const X* k, int64_t sk, const X* v, int64_t sv, int64_t begin,
                                      int64_t keys) const {
    for (int64_t j = 0; j < keys; j += kWidth)
      for (int64_t i = 0; i < item.count * d.rows; ++i)
        put(dots(k + j * sk, sk, room.q + i * padded, padded) * d.scale, room.scores + i * kTile + j);
    float* s = room.scores;
    for (int64_t m = 0; m < item.count; ++m)
      for (int64_t i = 0; i < d.rows; ++i, s += kTile) {
        float* rec = record_of(d.first[item.members[m]] + item.part, h, i);
        int64_t low = 0, high = keys;
        if (item.slot < 0) {  // query i % t of t: all but the last see less than the request's keys
          const int64_t end = d.lengths[item.members[0]] - d.t + i % d.t + 1 - begin;
          high = min_of(high, end);
          low = d.window > 0 ? end - d.window : 0;
        }
        weigh(s, rec, keys, low, high);
        add_values(rec, s, v, sv, keys, padded);
      }
  }

  const E* row(const Keys& keys, const PrefixItem& item, int64_t h, int64_t j) const {
    int64_t outer = item.slot;
    if (outer < 0) {
      outer = item.members[0];
      if (d.table) outer = d.table[outer * d.table_stride + j / d.block], j %= d.block;
    }
    return static_cast<const E*>(keys.data) + outer * keys.outer + h * keys.head + j * keys.token;
  }

  // Keys begin..end of a request, of which the chip guesses those of one block at most.
  void fetch(const PrefixItem& item, int64_t h, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      const char *k = reinterpret_cast<const char*>(row(d.k, item, h, j)),
                 *v = reinterpret_cast<const char*>(row(d.v, item, h, j));
      for (int64_t byte = 0; byte < d.d * static_cast<int64_t>(sizeof(E)); byte += kLine) {
        __builtin_prefetch(k + byte, 0, 2);
        __builtin_prefetch(v + byte, 0, 2);
      }
    }
  }

  void attend(const PrefixItem& item, int64_t h, const Room& room) const {
    const Tokens<Wide<E>> q = {room.q, d.most, d.d, padded}, k = {room.keys, kTile, d.d, padded},
                          v = {room.values, kTile, d.d, padded};
    for (int64_t m = 0; m < item.count; ++m)
      for (int64_t i = 0; i < d.rows; ++i) {
        const int64_t request = item.members[m];
        q.pack(m * d.rows + i,
               static_cast<const E*>(d.q) + ((request * d.hkv + h) * d.rows + i) * d.d, 0, d.d);
        float* rec = record_of(d.first[request] + item.part, h, i);
        for (int64_t j = 0; j < padded; ++j) rec[j] = 0;
        largest(rec) = kLowest, total(rec) = 0;
      }
    const Keys &ks = item.slot < 0 ? d.k : d.pk, &vs = item.slot < 0 ? d.v : d.pv;
    // Gathered where a row is no whole number of blocks, or would be widened for each query anew.
    const bool gather = d.d != padded || (sizeof(E) == 2 && item.count * d.rows > 1);
    for (int64_t begin = item.begin, keys; begin < item.end; begin += keys) {
      keys = min_of(kTile, item.end - begin);
      if (item.slot < 0 && d.table) {
        if (!gather) keys = min_of(keys, d.block - begin % d.block);
        fetch(item, h, begin + keys, min_of(begin + 2 * keys, item.end));
      }
      if (!gather && keys % kWidth == 0) {
        tile(room, item, h, row(ks, item, h, begin), ks.token, row(vs, item, h, begin), vs.token,
             begin, keys);
        continue;
      }
      for (int64_t j = 0; j < keys; ++j) {
        k.pack(j, row(ks, item, h, begin + j), 0, d.d);
        v.pack(j, row(vs, item, h, begin + j), 0, d.d);
      }
      for (int64_t i = keys * padded; i < round_up(keys, kWidth) * padded; ++i) room.keys[i] = 0;
      tile<float>(room, item, h, room.keys, padded, room.values, padded, begin, keys);
    }
  }

  void merge(int64_t b, int64_t h) const {
    const int64_t begin = d.first[b], end = d.first[b + 1];
    for (int64_t i = 0; i < d.rows; ++i) {
      float top = kLowest, weight = 0;
      for (int64_t p = begin; p < end; ++p) {
        const float m = largest(record_of(p, h, i));
        top = m > top ? m : top;
      }
      const float shift = top == kLowest ? 0.0f : top;
      for (int64_t p = begin; p < end; ++p) {
        float* rec = record_of(p, h, i);
        weight += total(rec) * (largest(rec) = exp_of(largest(rec) - shift));
      }
      const int64_t query = (b * d.hkv + h) * d.rows + i;
      E* out = static_cast<E*>(d.out) + query * d.d;
      d.lse[query] = weight == 0 ? kLowest : shift + __builtin_logf(weight);
      if (weight == 0) {  // it sees nothing
        for (int64_t j = 0; j < d.d; ++j) from_float(0.0f, out + j);
        continue;
      }
      float* sums = record_of(begin, h, i);
      for (int64_t p = begin; p < end; ++p) {
        const float* rec = record_of(p, h, i);
        const F share = all(rec[padded] / weight);
        for (int64_t j = 0; j < padded; j += kWidth)
          put(p == begin ? at(rec + j) * share : fma(at(rec + j), share, at(sums + j)), sums + j);
      }
      for (int64_t j = 0; j < d.d; ++j)
        from_float(sums[packed_at(j, static_cast<const E*>(nullptr))], out + j);
    }
  }

  void run(int threads) const {
#pragma omp parallel num_threads(threads)
    {
      const Room own = room(omp_get_thread_num());
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < d.count * d.hkv; ++i) attend(d.items[i / d.hkv], i % d.hkv, own);
#pragma omp for
      for (int64_t i = 0; i < d.b * d.hkv; ++i) merge(i / d.hkv, i % d.hkv);
    }
  }
};

template <class E>
void prefix_decode_as(const PrefixDecode& d) {
  // A core does some 2^16 products while another wakes up.
  const int64_t most = min_of(omp_get_max_threads(), d.work >> 16);
  const int threads = most > 1 ? static_cast<int>(most) : 1;
  Attend<E>(d, threads).run(threads);
}

inline void prefix_decode_any(const PrefixDecode& d) {
  if (d.dtype == kFloat32) return prefix_decode_as<float>(d);
  if (d.dtype == kBFloat16) return prefix_decode_as<BFloat16>(d);
  return prefix_decode_as<Float16>(d);
}

}  // namespace
}  // namespace fusedpeft::cpu
