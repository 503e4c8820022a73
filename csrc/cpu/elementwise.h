// What stands between the products of a frozen block, RMSNorm and the gate of an FFN: one pass each,
// forward and backward, fp32 inside. Included by one file for each instruction set.
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

template <class T, int kind>
void gated_span(const Gated& a, int64_t begin, int64_t end) {
  alignas(64) float gate[kChunk], up[kChunk], dy[kChunk];
  const T *gates = static_cast<const T*>(a.gate), *ups = static_cast<const T*>(a.up);
  const T* above = static_cast<const T*>(a.dy);
  T *out = static_cast<T*>(a.out), *dup = static_cast<T*>(a.dup);
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t n = min_of(kChunk, end - i);
    take(gates + i, n, gate);
    take(ups + i, n, up);
    if (above) take(above + i, n, dy);
    for (int64_t k = 0; k < n; k += kWidth) {
      const F g = at(gate + k), u = at(up + k), active = activation_of(kind, g);
      if (!above) {
        put(active * u, gate + k);
        continue;
      }
      const F d = at(dy + k);
      put(d * u * slope_of(kind, g), gate + k);
      put(d * active, up + k);
    }
    store_as(gate, out + i, n);
    if (above) store_as(up, dup + i, n);
  }
}

template <class T, int kind>
void gated_by(const Gated& a) {
  const int64_t chunks = ceil_div(a.count, kChunk);
  share(chunks, kChunk, [&](int64_t begin, int64_t end) {
    gated_span<T, kind>(a, begin * kChunk, min_of(end * kChunk, a.count));
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

}  // namespace
}  // namespace fusedpeft::cpu
