// y = residual + scale * (act(norm(x) D^T + c) U^T + e) for a few tokens, each with its own adapter.
//
// Tokens are taken in the order of their slots, so that those that share one share the reads of its
// D and U. The order of work, in one parallel region with two barriers:
//   1. x is normalised and packed (see Wide), the tokens or pieces of them split over the threads;
//   2. h = act(x D^T + c), the rows of all D split over the threads;
//   3. y, the rows of all U split over the threads.
// A row's sums run over d and E in the same order whatever the threads and the other tokens are.
#pragma once

#include "products.h"

namespace fusedpeft::cpu {
namespace {

// Rows whose sums are held at a time: whole vectors of sums, and whole chunks of most sizes.
constexpr int64_t kHeld = round_up(24, kWidth);

// acc[n, m] = row n of w times token m, for at most kHeld rows; those after them are fetched.
template <class P>
void products(F* acc, const typename P::Element* w, int64_t sw, int64_t rows, const Tokens<P>& x) {
  const Groups groups(static_cast<int>(x.m));
  const int64_t chunks = ceil_div(rows, rows_for(groups.size));
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = rows * c / chunks, count = rows * (c + 1) / chunks - first;
    for (int g = 0; g < groups.count; ++g) {
      const int token = groups.begin(g), tokens = groups.size - (g < groups.larger ? 0 : 1);
      const Ahead next = {
          reinterpret_cast<const char*>(w + (first + count) * sw + x.k / groups.count * g),
          groups.count * kStep<P> / static_cast<int64_t>(sizeof *w)};
      dot_of<P>(static_cast<int>(count), tokens)(acc + first * kTokens + token, true,
                                                 w + first * sw, sw, x.x + token * x.stride,
                                                 x.stride, x.k, next);
    }
  }
}

// --- the way between ----------------------------------------------------------------------------

inline float activate(int kind, float v) {
  switch (kind) {
    case kRelu: return v < 0 ? 0 : v;
    case kGelu: return 0.5f * v * (1 + __builtin_erff(v * 0.70710678118654752f));
    case kGeluTanh:
      return 0.5f * v * (1 + __builtin_tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case kSilu: return v / (1 + __builtin_expf(-v));
    case kTanh: return __builtin_tanhf(v);
    default: return v > 0 ? v : 0.01f * v;  // kLeakyRelu
  }
}

// out = (x - mean) / deviation * w + b in the order of Wide<E>'s blocks, padded with zeros. x may be
// out. The sum of squares is that of x - mean, which rows far from zero need.
template <class E>
void normalise(const E* x, const E* w, const E* b, float* out, int64_t d, int norm, float eps) {
  using P = Wide<E>;
  const int64_t whole = d / P::kBlock * P::kBlock;
  float mean = 0, squares = 0;
  if (norm == kLayerNorm) {
    F total = {};
    for (int64_t i = 0; i < whole; i += P::kBlock)
      total += P::template load<0>(x + i) + P::template load<1>(x + i);
    mean = sum(total);
    for (int64_t i = whole; i < d; ++i) mean += to_float(x[i]);
    mean /= static_cast<float>(d);
  }
  F total[2] = {};
  for (int64_t i = 0; i < whole; i += P::kBlock) {
    const F even = P::template load<0>(x + i) - mean, odd = P::template load<1>(x + i) - mean;
    total[0] = fma(even, even, total[0]);
    total[1] = fma(odd, odd, total[1]);
  }
  squares = sum(total[0] + total[1]);
  for (int64_t i = whole; i < d; ++i) squares += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  const float rate = 1 / __builtin_sqrtf(squares / static_cast<float>(d) + eps);

  const auto block = [&](const E* from, const E* weight, const E* bias, float* to) {
    const F one = F{} + 1.0f;
    const F even = (P::template load<0>(from) - mean) * rate;
    const F odd = (P::template load<1>(from) - mean) * rate;
    *reinterpret_cast<UnalignedF*>(to) = fma(even, weight ? P::template load<0>(weight) : one,
                                             bias ? P::template load<0>(bias) : F{});
    *reinterpret_cast<UnalignedF*>(to + kWidth) =
        fma(odd, weight ? P::template load<1>(weight) : one,
            bias ? P::template load<1>(bias) : F{});
  };
  for (int64_t i = 0; i < whole; i += P::kBlock) block(x + i, w ? w + i : w, b ? b + i : b, out + i);
  if (whole < d) {
    E edges[3][P::kBlock] = {};
    const int64_t bytes = (d - whole) * static_cast<int64_t>(sizeof(E));
    copy(edges[0], x + whole, bytes);
    if (w) copy(edges[1], w + whole, bytes);
    if (b) copy(edges[2], b + whole, bytes);
    block(edges[0], w ? edges[1] : w, b ? edges[2] : b, out + whole);
    for (int64_t i = d - whole; i < P::kBlock; ++i)
      out[whole + packed_at(i, x)] = 0;  // of x - mean there is nothing to keep
  }
}

// --- the call -----------------------------------------------------------------------------------

// x, residual and y of T, adapters of TA; PD: the products of x with D.
template <class T, class TA, class PD>
struct AdapterCall {
  using PU = Wide<TA>;
  static constexpr int64_t kBlocks = 4 * kWidth;  // a multiple of every kBlock
  static constexpr int64_t kPiece = 1024;         // elements that a thread packs at a time

  struct Segment {  // tokens of one slot
    int64_t slot, size, first, count;
  };

  const Adapters& a;
  Tokens<PD> x;
  Tokens<PU> h;
  int64_t held = 0, segments = 0;  // tokens with an adapter, which come first
  int order[kMaxTokens];
  Segment segment[kMaxTokens];

  explicit AdapterCall(const Adapters& a) : a(a) {
    int64_t largest = 0, rest = a.m;
    for (int64_t m = a.m - 1; m >= 0; --m)
      if (size_of(m) == 0) order[--rest] = static_cast<int>(m);
    for (int64_t m = 0; m < a.m; ++m) {  // few tokens: by insertion
      if (size_of(m) == 0) continue;
      int64_t at = held++;
      for (; at > 0 && slot_of(order[at - 1]) > slot_of(m); --at) order[at] = order[at - 1];
      order[at] = static_cast<int>(m);
    }
    for (int64_t i = 0; i < held; ++i) {
      const int64_t slot = slot_of(order[i]);
      if (segments && segment[segments - 1].slot == slot && segment[segments - 1].count < kTokens) {
        ++segment[segments - 1].count;
      } else {
        segment[segments++] = {slot, a.size[slot], i, 1};
        if (a.size[slot] > largest) largest = a.size[slot];
      }
    }
    // A line more than needed: rows a power of two apart would fall into the same sets of the L1.
    const int64_t sx = round_up(a.d, kBlocks) + kLine / 4, sh = round_up(largest, kBlocks);
    auto* memory = static_cast<float*>(scratch(held * (sx + sh) * sizeof(float)));
    h = {memory, held, largest, sh};
    for (int64_t i = 0; i < held * sh; ++i) memory[i] = 0;
    x = {reinterpret_cast<typename PD::Packed*>(memory + held * sh), held, a.d, sx};
  }

  int64_t slot_of(int64_t m) const { return a.slots ? a.slots[m] : 0; }
  int64_t size_of(int64_t m) const { return slot_of(m) < 0 ? 0 : a.size[slot_of(m)]; }
  const TA* of_slot(const void* p, int64_t stride, int64_t slot) const {
    return p ? static_cast<const TA*>(p) + slot * stride : nullptr;
  }
  const T* row(const void* p, int64_t stride, int64_t i) const {
    return p ? static_cast<const T*>(p) + order[i] * stride : nullptr;
  }

  void pack(int64_t thread, int64_t team) const {
    const int64_t pieces = a.norm ? 1 : ceil_div(a.d, kPiece), all = held * pieces;
    for (int64_t i = all * thread / team; i < all * (thread + 1) / team; ++i) {
      const int64_t token = i / pieces, begin = i % pieces * kPiece;
      const T* from = row(a.x, a.sx, token);
      if (!a.norm) {
        x.pack(token, from, begin, min_of(begin + kPiece, a.d));
      } else if constexpr (__is_same(PD, Wide<TA>)) {
        float* to = x.x + token * x.stride;
        const int64_t slot = slot_of(order[token]);
        const TA* w = of_slot(a.norm_weight, a.norm_weight_slot, slot);
        const TA* b = of_slot(a.norm_bias, a.norm_bias_slot, slot);
        if constexpr (__is_same(T, TA)) {
          normalise(from, w, b, to, a.d, a.norm, a.eps);
        } else {
          x.pack(token, from, 0, a.d);  // floats in order
          normalise(to, w, b, to, a.d, a.norm, a.eps);
        }
      }
    }
    for (int64_t i = held + thread; i < a.m; i += team) {  // no adapter
      const T* from = row(a.residual, a.sr, i);
      T* to = static_cast<T*>(a.y) + order[i] * a.sy;
      for (int64_t j = 0; j < a.d; ++j) to[j] = from ? from[j] : T{};
    }
  }

  // Calls work(segment, begin, end) with this thread's share of the rows of all segments; a row
  // costs its loads, and something a token.
  template <class Rows, class Work>
  void share(int64_t thread, int64_t team, Rows rows, Work work) const {
    int64_t all = 0, before = 0;
    const auto cost = [](const Segment& s) { return s.count + 3; };
    for (int64_t i = 0; i < segments; ++i) all += rows(segment[i]) * cost(segment[i]);
    const int64_t from = all * thread / team, to = all * (thread + 1) / team;
    for (int64_t i = 0; i < segments && before < to; ++i) {
      const Segment& s = segment[i];
      const int64_t n = rows(s), end = before + n * cost(s);
      const auto row = [&](int64_t at) {  // vectors of sums stay whole
        return at <= before ? 0 : at >= end ? n : min_of(n, round_up((at - before) / cost(s), kWidth));
      };
      if (row(from) < row(to)) work(s, row(from), row(to));
      before = end;
    }
  }

  // Calls store(token, n, vector of sums of rows n.., how many of them) for rows begin..end of w.
  template <class P, class Store>
  void multiply(const TA* w, int64_t sw, int64_t begin, int64_t end, const Tokens<P>& tokens,
                Store store) const {
    F acc[kHeld * kTokens];
    for (int64_t n = begin; n < end; n += kHeld) {
      const int64_t rows = min_of(kHeld, end - n);
      products(acc, w + n * sw, sw, rows, tokens);
      for (int64_t i = rows * kTokens; i < round_up(rows, kWidth) * kTokens; ++i) acc[i] = F{};
      for (int64_t m = 0; m < tokens.m; ++m)
        for (int64_t i = 0; i < rows; i += kWidth) {
          F v[kWidth];
#pragma GCC unroll 16
          for (int j = 0; j < kWidth; ++j) v[j] = acc[(i + j) * kTokens + m];
          store(m, n + i, sums(v), min_of(kWidth, rows - i));
        }
    }
  }

  void down(int64_t thread, int64_t team) const {
    share(thread, team, [](const Segment& s) { return s.size; },
          [&](const Segment& s, int64_t begin, int64_t end) {
      const TA* w = of_slot(a.down, a.down_slot, s.slot);
      const TA* c = of_slot(a.down_bias, a.down_bias_slot, s.slot);
      const Tokens<PD> tokens = {x.x + s.first * x.stride, s.count, a.d, x.stride};
      multiply(w, a.sd, begin, end, tokens, [&](int64_t m, int64_t r, F p, int64_t count) {
        float* to = h.x + (s.first + m) * h.stride;
        for (int64_t j = 0; j < count; ++j)
          to[packed_at(r + j, w)] = activate(a.activation, p[j] + (c ? to_float(c[r + j]) : 0.0f));
      });
    });
  }

  void up(int64_t thread, int64_t team) const {
    share(thread, team, [&](const Segment&) { return a.d; },
          [&](const Segment& s, int64_t begin, int64_t end) {
      const TA* w = of_slot(a.up, a.up_slot, s.slot);
      const TA* e = of_slot(a.up_bias, a.up_bias_slot, s.slot);
      const float scale = a.scale[s.slot];
      const Tokens<PU> tokens = {h.x + s.first * h.stride, s.count, s.size, h.stride};
      const int64_t su = a.su ? a.su : round_up(s.size, kRankStep);
      multiply(w, su, begin, end, tokens, [&](int64_t m, int64_t n, F u, int64_t count) {
        const T* from = row(a.residual, a.sr, s.first + m);
        T* to = static_cast<T*>(a.y) + order[s.first + m] * a.sy;
        for (int64_t j = 0; j < count; ++j) {
          const float v = scale * (u[j] + (e ? to_float(e[n + j]) : 0.0f));
          from_float(from ? to_float(from[n + j]) + v : v, to + n + j);
        }
      });
    });
  }

  void run() const {
    int64_t work = 0;  // products, as in decode.h
    for (int64_t i = 0; i < segments; ++i) work += segment[i].size * (segment[i].count + 3);
    const int64_t worth = work * a.d / 2 >> 16;
    const int threads = static_cast<int>(min_of(omp_get_max_threads(), worth));
    if (threads <= 1) {
      pack(0, 1);
      down(0, 1);
      up(0, 1);
      return;
    }
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      pack(thread, team);
#pragma omp barrier
      down(thread, team);
#pragma omp barrier
      up(thread, team);
    }
  }
};

template <class T>
void adapters_wide(const Adapters& a) {
  if (a.adapter_dtype == a.dtype) return AdapterCall<T, T, Wide<T>>(a).run();
  if constexpr (sizeof(T) == 2) return AdapterCall<T, float, Wide<float>>(a).run();
}

inline void adapters_any(const Adapters& a) {
  if (a.dtype == kFloat32) return adapters_wide<float>(a);
  if (a.dtype == kBFloat16) return adapters_wide<BFloat16>(a);
  return adapters_wide<Float16>(a);
}

}  // namespace
}  // namespace fusedpeft::cpu
