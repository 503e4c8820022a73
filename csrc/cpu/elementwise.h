// What stands between the products of a frozen model, one pass each, fp32 inside: RMSNorm, the gate of
// an FFN and rotary positions, forward and backward, and the softmax of logits. Included by one file
// for each instruction set.
//
// A row's sums run in the same order whatever the threads are.
#pragma once

#include "functions.h"
#include "panels.h"

namespace fusedpeft::cpu {
namespace {

constexpr int64_t kChunk = 256;  // numbers on their way, in the nearest cache: whole vectors

// n numbers, with zeros up to whole vectors.
template <class T>
FUSEDPEFT_INLINE void take(const T* from, int64_t n, float* to) {
  load_as(from, to, n);
  for (int64_t i = n; i % kWidth != 0; ++i) to[i] = 0;
}

// work(begin, end) by threads, each its own part of 0..count, of `numbers` each.
template <class Work>
void share(int64_t count, int64_t numbers, const Work& work) {
  // A core does some 2^13 numbers while another wakes up.
  const int64_t worth = count * numbers >> 13;
  const int threads = static_cast<int>(min_of(min_of(omp_get_max_threads(), worth), count));
  if (threads <= 1) return work(int64_t{0}, count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    work(count * thread / team, count * (thread + 1) / team);
  }
}

// --- RMSNorm --------------------------------------------------------------------------------------

// With r = 1 / sqrt(mean(x^2) + eps) and v = w + offset: y = x r v, and
// dx = r (v dy - x r mean(x r v dy)).
template <class T>
void rms_norm_row(const RmsNorm& a, int64_t row) {
  alignas(64) float x[kChunk], v[kChunk], dy[kChunk];
  const T* from = static_cast<const T*>(a.x) + row * a.d;
  const T* weight = static_cast<const T*>(a.weight);
  const T* above = a.dy ? static_cast<const T*>(a.dy) + row * a.d : nullptr;
  T* out = static_cast<T*>(a.out) + row * a.d;

  F squares = {}, products = {};
  for (int64_t i = 0; i < a.d; i += kChunk) {
    const int64_t n = min_of(kChunk, a.d - i);
    take(from + i, n, x);
    if (!above) {
      for (int64_t k = 0; k < n; k += kWidth) squares = fma(at(x + k), at(x + k), squares);
      continue;
    }
    take(weight + i, n, v);
    take(above + i, n, dy);
    for (int64_t k = 0; k < n; k += kWidth) {
      squares = fma(at(x + k), at(x + k), squares);
      products = fma(at(x + k) * (at(v + k) + a.offset), at(dy + k), products);
    }
  }
  const double r64 = 1.0 / __builtin_sqrt(static_cast<double>(sum(squares)) / a.d + a.eps);
  const float r = static_cast<float>(r64), mean = static_cast<float>(r64 * sum(products) / a.d);

  for (int64_t i = 0; i < a.d; i += kChunk) {
    const int64_t n = min_of(kChunk, a.d - i);
    take(from + i, n, x);
    take(weight + i, n, v);
    if (above) take(above + i, n, dy);
    for (int64_t k = 0; k < n; k += kWidth) {
      const F scale = at(v + k) + a.offset, unit = at(x + k) * r;
      put(above ? (scale * at(dy + k) - unit * mean) * r : unit * scale, x + k);
    }
    store_as(x, out + i, n);
  }
}

template <class T>
void rms_norm_as(const RmsNorm& a) {
  share(a.m, a.d, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) rms_norm_row<T>(a, row);
  });
}

inline void rms_norm_any(const RmsNorm& a) {
  if (a.dtype == kFloat32) return rms_norm_as<float>(a);
  if (a.dtype == kBFloat16) return rms_norm_as<BFloat16>(a);
  rms_norm_as<Float16>(a);
}

// --- act(gate) * up -------------------------------------------------------------------------------

// Of a row, the numbers begin.. begin + kChunk.
template <class T, int kind>
void gated_piece(const Gated& a, int64_t row, int64_t begin) {
  alignas(64) float gate[kChunk], up[kChunk], dy[kChunk];
  const int64_t n = min_of(kChunk, a.width - begin), dense = row * a.width + begin;
  take(static_cast<const T*>(a.gate) + row * a.gate_row + begin, n, gate);
  take(static_cast<const T*>(a.up) + row * a.up_row + begin, n, up);
  if (a.dy) take(static_cast<const T*>(a.dy) + dense, n, dy);
  for (int64_t k = 0; k < n; k += kWidth) {
    const F g = at(gate + k), u = at(up + k), active = activation_of(kind, g);
    if (!a.dy) {
      put(active * u, gate + k);
      continue;
    }
    const F d = at(dy + k);
    put(d * u * slope_of(kind, g), gate + k);
    put(d * active, up + k);
  }
  store_as(gate, static_cast<T*>(a.out) + dense, n);
  if (a.dy) store_as(up, static_cast<T*>(a.dup) + dense, n);
}

template <class T, int kind>
void gated_by(const Gated& a) {
  const int64_t pieces = ceil_div(a.width, kChunk);
  share(a.rows * pieces, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gated_piece<T, kind>(a, i / pieces, i % pieces * kChunk);
  });
}

template <class T>
void gated_as(const Gated& a) {
  if (a.activation == kSilu) return gated_by<T, kSilu>(a);
  if (a.activation == kGelu) return gated_by<T, kGelu>(a);
  gated_by<T, kGeluTanh>(a);
}

inline void gated_any(const Gated& a) {
  if (a.dtype == kFloat32) return gated_as<float>(a);
  if (a.dtype == kBFloat16) return gated_as<BFloat16>(a);
  gated_as<Float16>(a);
}

// --- rotary positions -----------------------------------------------------------------------------

// Of token t of request b, all heads.
template <class T>
void rotary_token(const Rotary& a, int64_t b, int64_t t) {
  alignas(64) float cos[2][kChunk], sin[2][kChunk], x[2][kChunk];
  const T* cosines = static_cast<const T*>(a.cos) + b * a.cos_b + t * a.cos_t;
  const T* sines = static_cast<const T*>(a.sin) + b * a.sin_b + t * a.sin_t;
  const T* from = static_cast<const T*>(a.x) + b * a.x_b + t * a.x_t;
  T* out = static_cast<T*>(a.out) + b * a.out_b + t * a.out_t;
  const int64_t half = a.d / 2;
  for (int64_t i = 0; i < half; i += kChunk) {
    const int64_t n = min_of(kChunk, half - i);
    for (int64_t side = 0; side < 2; ++side) {
      take(cosines + side * half + i, n, cos[side]);
      take(sines + side * half + i, n, sin[side]);
    }
    for (int64_t h = 0; h < a.h; ++h) {
      for (int64_t side = 0; side < 2; ++side) take(from + h * a.x_h + side * half + i, n, x[side]);
      for (int64_t k = 0; k < n; k += kWidth) {
        const F one = at(x[0] + k), two = at(x[1] + k);
        const F to_one = a.backward ? at(sin[1] + k) : -at(sin[0] + k);
        const F to_two = a.backward ? -at(sin[0] + k) : at(sin[1] + k);
        put(fma(two, to_one, one * at(cos[0] + k)), x[0] + k);
        put(fma(one, to_two, two * at(cos[1] + k)), x[1] + k);
      }
      for (int64_t side = 0; side < 2; ++side) store_as(x[side], out + h * a.out_h + side * half + i, n);
    }
  }
}

template <class T>
void rotary_as(const Rotary& a) {
  share(a.b * a.t, a.h * a.d, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rotary_token<T>(a, i / a.t, i % a.t);
  });
}

inline void rotary_any(const Rotary& a) {
  if (a.dtype == kFloat32) return rotary_as<float>(a);
  if (a.dtype == kBFloat16) return rotary_as<BFloat16>(a);
  rotary_as<Float16>(a);
}

// --- softmax --------------------------------------------------------------------------------------

// A row stays in the cache between its three turns.
inline void softmax_row(float* z, float* lse, int64_t cols, bool write) {
  constexpr int64_t chains = 4, block = chains * kWidth;
  const int64_t whole = cols / block * block;
  F tops[chains];
  for (F& top : tops) top = all(-__builtin_inff());
  for (int64_t i = 0; i < whole; i += block)
#pragma GCC unroll 4
    for (int64_t c = 0; c < chains; ++c) {
      const F v = at(z + i + c * kWidth);
      tops[c] = v > tops[c] ? v : tops[c];
    }
  float top = -__builtin_inff();
  for (const F& part : tops)
    for (int64_t l = 0; l < kWidth; ++l) top = part[l] > top ? part[l] : top;
  for (int64_t i = whole; i < cols; ++i) top = z[i] > top ? z[i] : top;

  double total = 0;
  for (int64_t i = 0; i < whole;) {
    F sums[chains] = {};
    for (const int64_t stop = min_of(i + kChunk * chains, whole); i < stop; i += block)
#pragma GCC unroll 4
      for (int64_t c = 0; c < chains; ++c) {
        float* p = z + i + c * kWidth;
        const F e = exp_of(at(p) - top);
        if (write) put(e, p);
        sums[c] += e;
      }
    for (const F& part : sums) total += static_cast<double>(sum(part));
  }
  for (int64_t i = whole; i < cols; ++i) {
    const float e = exp_of(z[i] - top);
    if (write) z[i] = e;
    total += static_cast<double>(e);
  }
  *lse = static_cast<float>(static_cast<double>(top) + __builtin_log(total));
  if (!write) return;
  const float rate = static_cast<float>(1 / total);
  for (int64_t i = 0; i < whole; i += kWidth) put(at(z + i) * rate, z + i);
  for (int64_t i = whole; i < cols; ++i) z[i] *= rate;
}

inline void softmax_any(const Softmax& a) {
  share(a.rows, a.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) softmax_row(a.z + i * a.cols, a.lse + i, a.cols, a.write);
  });
}

}  // namespace
}  // namespace fusedpeft::cpu
