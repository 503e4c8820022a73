// Attention of many queries over a prefix and keys, and its gradients; fp32 inside. Included by one
// file for each instruction set.
//
// Keys go in blocks, packed once for all queries of a row and head as the products want them, the
// prefix's blocks first; queries in blocks too, each against the blocks that one of them sees. Forward
// keeps a running maximum and sum. Backward has P again from the logsumexp:
//   dV += P^T dO, dP = dO V^T, dS = P (dP - delta), dQ += dS K, dK += dS^T Q,  delta = dO . O - dlse
// A thread has heads of k of its own, and of a head all rows in their order: no two add to the same
// gradient, and no sum depends on the threads. (Dao 2023, "FlashAttention-2", section 3.1.)
#pragma once

#include "panels.h"

namespace fusedpeft::cpu {
namespace {

constexpr int64_t kShort = 32;  // products of a chain: exp makes much of what scores lose
constexpr float kNone = -__builtin_inff();

FUSEDPEFT_INLINE F larger(F a, F b) { return a > b ? a : b; }
FUSEDPEFT_INLINE float largest(F v) {
  U lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
#pragma GCC unroll 4
  for (uint32_t half = kWidth / 2; half > 0; half /= 2)
    v = larger(v, __builtin_shuffle(v, lane ^ half));
  return v[0];
}

// out[rows, columns] (+)= sum over k of a[r * sr + k * sk] * b[k, c]; rows are rounded up.
inline void product(const Packed& b, const float* a, int64_t sr, int64_t sk, int64_t rows, float* out,
                    int64_t so, bool fresh) {
  for (int64_t i = 0; i < b.columns.blocks; ++i) {
    const auto run = tile_of<kShort>(b.columns.width(i) / kWidth);
    for (int64_t r = 0; r < rows; r += kTileRows)
      run(a + r * sr, sr, sk, b.block(i), b.k, out + r * so + b.columns.begin(i), so, fresh);
  }
}

template <class T>
struct PrefixTrainCall {
  const PrefixTrain& a;
  const Columns of_d, of_keys{kBlockKeys};
  const int64_t dp, blocks_of_prefix, blocks;  // dp: d with its zeros
  float *kt, *v, *vt, *k, *dk, *dv;            // blocks: packed K^T, V, V^T, K; [keys, dp]
  float *q, *o, *packed_q, *packed_o, *s, *ds, *dq;  // of a block of queries

  static int64_t blocks_for(int64_t keys) { return ceil_div(keys, kBlockKeys); }

  PrefixTrainCall(const PrefixTrain& a, int64_t thread)
      : a(a), of_d(a.d), dp(of_d.padded()), blocks_of_prefix(blocks_for(a.p)),
        blocks(blocks_of_prefix + blocks_for(a.s)) {
    float* at = a.work + thread * prefix_train_floats(a.p, a.s, a.d, a.dout.data != nullptr);
    const auto take = [&](int64_t n) {
      float* own = at;
      at += n;
      return own;
    };
    const int64_t all = blocks * kBlockKeys * dp, some = kBlockQueries * dp;
    const int64_t square = kBlockQueries * kBlockKeys;
    kt = take(all), v = take(all), q = take(some), o = take(some), s = take(square);
    if (!a.dout.data) return;
    vt = take(all), k = take(all), dk = take(all), dv = take(all);
    packed_q = take(some), packed_o = take(some), dq = take(some), ds = take(square);
  }

  static T* place(const Keys& of, int64_t b, int64_t h, int64_t t) {
    return static_cast<T*>(const_cast<void*>(of.data)) + b * of.outer + h * of.head + t * of.token;
  }

  // Rows first.. of a head, `count` of them, and zeros up to `most`; [most, dp].
  void load(const Keys& of, int64_t b, int64_t h, int64_t first, int64_t count, int64_t most,
            float* to) const {
    for (int64_t r = 0; r < most; ++r) {
      const int64_t n = r < count ? a.d : 0;
      if (n) load_as(place(of, b, h, first + r), to + r * dp, n);
      for (int64_t i = n; i < dp; ++i) to[r * dp + i] = 0;
    }
  }

  Packed rows_packed(float* data, int64_t rows) const { return {data, rows, of_d}; }
  Packed keys_packed(float* data) const { return {data, a.d, of_keys}; }
  float* block(float* of, int64_t j) const { return of + j * kBlockKeys * dp; }

  // Blocks first.. of `count` keys.
  void pack(const Keys& of_k, const Keys& of_v, int64_t b, int64_t h, int64_t count, int64_t first) {
    for (int64_t at = 0; at < count; at += kBlockKeys, ++first) {
      const int64_t n = min_of(kBlockKeys, count - at);
      const auto side = [&](const Keys& of, float* columns, float* rows) {
        load(of, b, h, at, n, kBlockKeys, q);  // q: nobody's yet
        for (int64_t c = 0; columns && c < kBlockKeys; c += kWidth)
          keys_packed(block(columns, first)).put_columns(c, q + c * dp, dp);
        for (int64_t r = 0; rows && r < kBlockKeys; ++r)
          rows_packed(block(rows, first), kBlockKeys).put_row(r, q + r * dp);
      };
      side(of_k, kt, a.dout.data ? k : nullptr);
      side(of_v, a.dout.data ? vt : nullptr, a.dout.data ? nullptr : v);
    }
  }

  // Keys from `low` to before `high` are all that queries first..last of a row see.
  void seen(int64_t first, int64_t last, int64_t* low, int64_t* high) const {
    first += a.s - a.t, last += a.s - a.t;
    *low = a.window && first >= a.window ? first - a.window + 1 : 0;
    *high = a.causal ? last + 1 : a.window ? min_of(a.s, last + a.window) : a.s;
  }

  // Calls fn(block, its keys, the first of them or -1 for the prefix's) for all that a query of
  // first..last sees.
  template <class Fn>
  void each_block(bool prefix, bool keys, int64_t first, int64_t last, Fn fn) const {
    for (int64_t j = 0; prefix && j < blocks_of_prefix; ++j)
      fn(j, min_of(kBlockKeys, a.p - j * kBlockKeys), int64_t{-1});
    int64_t low, high;
    seen(first, last, &low, &high);
    for (int64_t at = low / kBlockKeys * kBlockKeys; keys && at < high; at += kBlockKeys)
      fn(blocks_of_prefix + at / kBlockKeys, min_of(kBlockKeys, a.s - at), at);
  }

  // s of queries first.. (rows of them) against `count` keys from `at` on (-1: of the prefix): the
  // mask added, and -inf for what is not seen.
  void hide(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t count, int64_t at) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * kBlockKeys;
      int64_t low = 0, high = count;
      if (at >= 0) {
        if (a.mask) {
          const float* mask = a.mask + b * a.mask_b + h * a.mask_h + (first + r) * a.mask_t + at;
          for (int64_t c = 0; c < count; ++c) row[c] += mask[c];
        }
        seen(first + r, first + r, &low, &high);
        low -= at, high = min_of(high - at, count);
      }
      for (int64_t c = 0; c < min_of(low, kBlockKeys); ++c) row[c] = kNone;
      for (int64_t c = high < 0 ? 0 : high; c < kBlockKeys; ++c) row[c] = kNone;
    }
  }

  // --- forward ---

  void forward(int64_t b, int64_t of_k) {
    const int64_t id = a.ids[b], group = a.h / a.hkv;
    if (id >= 0) pack(a.pk, a.pv, id, of_k, a.p, 0);
    pack(a.k, a.v, b, of_k, a.s, blocks_of_prefix);
    for (int64_t h = of_k * group; h < (of_k + 1) * group; ++h)
      for (int64_t t = 0; t < a.t; t += kBlockQueries)
        forward_block(b, h, t, min_of(kBlockQueries, a.t - t), id >= 0);
  }

  void forward_block(int64_t b, int64_t h, int64_t t, int64_t rows, bool prefix) {
    float most[kBlockQueries];
    F total[kBlockQueries] = {};
    bool fresh = true;
    load(a.q, b, h, t, rows, kBlockQueries, q);
    for (int64_t i = 0; i < kBlockQueries * dp; i += kWidth) put(a.scale * at(q + i), q + i);
    for (float& one : most) one = kNone;
    each_block(prefix, true, t, t + rows - 1, [&](int64_t j, int64_t count, int64_t first) {
      product(keys_packed(block(kt, j)), q, dp, 1, rows, s, kBlockKeys, true);
      hide(b, h, t, rows, count, first);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = s + r * kBlockKeys;
        F high = at(row);
        for (int64_t c = kWidth; c < kBlockKeys; c += kWidth) high = larger(at(row + c), high);
        const float before = most[r], now = largest(high) > before ? largest(high) : before;
        const float shift = now == kNone ? 0 : now;
        most[r] = now;
        if (now != before) {
          const F rate = exp_of(all(before - shift));
          total[r] *= rate;
          for (int64_t i = 0; !fresh && i < dp; i += kWidth)
            put(at(o + r * dp + i) * rate, o + r * dp + i);
        }
        for (int64_t c = 0; c < kBlockKeys; c += kWidth) {
          const F p = exp_of(at(row + c) - shift);
          total[r] += p;
          put(p, row + c);
        }
      }
      product(rows_packed(block(v, j), kBlockKeys), s, kBlockKeys, 1, rows, o, dp, fresh);
      fresh = false;
    });
    for (int64_t r = 0; r < rows; ++r) {
      const float weight = fresh ? 0 : sum(total[r]);
      float* row = o + r * dp;
      for (int64_t i = 0; i < dp; i += kWidth)
        put(weight == 0 ? F{} : at(row + i) / weight, row + i);
      store_as(row, place(a.out, b, h, t + r), a.d);
      a.lse[(b * a.h + h) * a.t + t + r] = weight == 0 ? kNone : most[r] + __builtin_logf(weight);
    }
  }

  // --- backward ---

  void backward(int64_t of_k) {
    const int64_t group = a.h / a.hkv;
    int64_t packed = -1;  // the prefix that is
    for (int64_t b = 0; b < a.b; ++b) {
      const int64_t id = a.ids[b];
      if (id >= 0 && id != packed) {
        add_prefix(packed, of_k);
        packed = id;
        pack(a.pk, a.pv, id, of_k, a.p, 0);
        clear(0, blocks_of_prefix);
      }
      if (a.dq.data) {
        pack(a.k, a.v, b, of_k, a.s, blocks_of_prefix);
        clear(blocks_of_prefix, blocks);
      }
      for (int64_t h = of_k * group; h < (of_k + 1) * group; ++h)
        for (int64_t t = 0; t < a.t; t += kBlockQueries)
          backward_block(b, h, t, min_of(kBlockQueries, a.t - t), id >= 0);
      for (int64_t i = 0; a.dq.data && i < a.s; ++i) {
        store_as(block(dk, blocks_of_prefix) + i * dp, place(a.dk, b, of_k, i), a.d);
        store_as(block(dv, blocks_of_prefix) + i * dp, place(a.dv, b, of_k, i), a.d);
      }
    }
    add_prefix(packed, of_k);
  }

  void clear(int64_t from, int64_t to) const {
    for (int64_t i = from * kBlockKeys * dp; i < to * kBlockKeys * dp; ++i) dk[i] = dv[i] = 0;
  }

  void add_prefix(int64_t id, int64_t of_k) const {
    for (int64_t i = 0; a.dpk && id >= 0 && i < a.p; ++i) {
      const int64_t row = ((id * a.hkv + of_k) * a.p + i) * a.d;
      for (int64_t c = 0; c < a.d; ++c) {
        a.dpk[row + c] += dk[i * dp + c];
        a.dpv[row + c] += dv[i * dp + c];
      }
    }
  }

  void backward_block(int64_t b, int64_t h, int64_t t, int64_t rows, bool prefix) {
    float lse[kBlockQueries], delta[kBlockQueries];
    load(a.out, b, h, t, rows, kBlockQueries, q);
    load(a.dout, b, h, t, rows, kBlockQueries, o);
    const Packed by_q = rows_packed(packed_q, rows), by_o = rows_packed(packed_o, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = (b * a.h + h) * a.t + t + r;
      F total = {};
      for (int64_t i = 0; i < dp; i += kWidth)
        total = fma(at(q + r * dp + i), at(o + r * dp + i), total);
      delta[r] = sum(total) - (a.dlse ? a.dlse[query] : 0);
      lse[r] = a.lse[query] == kNone ? 0 : a.lse[query];
      by_o.put_row(r, o + r * dp);
    }
    load(a.q, b, h, t, rows, kBlockQueries, q);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < dp; i += kWidth) put(a.scale * at(q + r * dp + i), q + r * dp + i);
      by_q.put_row(r, q + r * dp);
    }
    bool fresh = true;
    each_block(prefix, a.dq.data, t, t + rows - 1, [&](int64_t j, int64_t count, int64_t first) {
      product(keys_packed(block(kt, j)), q, dp, 1, rows, s, kBlockKeys, true);
      product(keys_packed(block(vt, j)), o, dp, 1, rows, ds, kBlockKeys, true);
      hide(b, h, t, rows, count, first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = r * kBlockKeys; i < (r + 1) * kBlockKeys; i += kWidth) {
          const F p = exp_of(at(s + i) - lse[r]);
          put(p, s + i);
          put(p * (at(ds + i) - delta[r]), ds + i);
        }
      if (first >= 0 || a.dpk) {
        product(by_o, s, 1, kBlockKeys, kBlockKeys, block(dv, j), dp, false);
        product(by_q, ds, 1, kBlockKeys, kBlockKeys, block(dk, j), dp, false);
      }
      if (a.dq.data)
        product(rows_packed(block(k, j), kBlockKeys), ds, kBlockKeys, 1, rows, dq, dp, fresh);
      fresh = false;
    });
    for (int64_t r = 0; a.dq.data && r < rows; ++r) {
      float* row = dq + r * dp;
      for (int64_t i = 0; i < dp; i += kWidth)
        put(fresh ? F{} : a.scale * at(row + i), row + i);
      store_as(row, place(a.dq, b, h, t + r), a.d);
    }
  }
};

template <class T>
void prefix_train_as(const PrefixTrain& a) {
  const int64_t tasks = a.dout.data ? a.hkv : a.b * a.hkv;
  const int threads = static_cast<int>(min_of(a.threads, tasks));
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    PrefixTrainCall<T> call(a, thread);
    for (int64_t i = tasks * thread / team; i < tasks * (thread + 1) / team; ++i) {
      if (a.dout.data) {
        call.backward(i);
      } else {
        call.forward(i / a.hkv, i % a.hkv);
      }
    }
  }
}

inline void prefix_train_any(const PrefixTrain& a) {
  if (a.dtype == kFloat32) return prefix_train_as<float>(a);
  if (a.dtype == kBFloat16) return prefix_train_as<BFloat16>(a);
  prefix_train_as<Float16>(a);
}

}  // namespace
}  // namespace fusedpeft::cpu
