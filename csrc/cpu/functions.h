// Functions of vectors of floats, for the instruction set of the file that includes this.
#pragma once

#include "products.h"

namespace fusedpeft::cpu {
namespace {

FUSEDPEFT_INLINE F all(float v) { return v - F{}; }  // + would turn -0 into 0
FUSEDPEFT_INLINE F at(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }
FUSEDPEFT_INLINE void put(F v, float* p) { *reinterpret_cast<UnalignedF*>(p) = v; }
FUSEDPEFT_INLINE F abs_of(F x) {
  return reinterpret_cast<F>(reinterpret_cast<U>(x) & 0x7fffffffu);
}

// e^x for x <= 0 to two units in the last place, 0 below -87; NaN stays. (Cephes, expf.)
FUSEDPEFT_INLINE F exp_of(F x) {
  const F low = all(-87.0f), shift = all(0x1.8p23f);  // adding it rounds to a whole number
  const F in = x < low ? low : x;
  const F shifted = fma(in, all(1.44269504f), shift), n = shifted - shift;
  const F r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), in));
  F p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const U power = (reinterpret_cast<U>(shifted) << 23) + 0x3f800000u;
  return x < low ? F{} : p * reinterpret_cast<F>(power);
}
FUSEDPEFT_INLINE float exp_of(float x) { return exp_of(all(x))[0]; }

// 1 / (1 + e^-x)
FUSEDPEFT_INLINE F sigmoid_of(F x) {
  const F power = exp_of(-abs_of(x)), whole = 1.0f / (1.0f + power);
  return x < 0.0f ? power * whole : whole;
}

FUSEDPEFT_INLINE F tanh_of(F x) {
  const F size = abs_of(x), power = exp_of(-2.0f * size), square = x * x;
  const F far = (1.0f - power) / (1.0f + power);
  F near = all(62.0f / 2835.0f);  // Taylor's: far from 1 the difference above rounds
  near = fma(near, square, all(-17.0f / 315.0f));
  near = fma(near, square, all(2.0f / 15.0f));
  near = fma(near, square, all(-1.0f / 3.0f));
  near = fma(near * square, x, x);
  return size < 0.25f ? near : x < 0.0f ? -far : far;
}

// The normal distribution's Phi(x), within 2e-7 of itself. (Press et al., "Numerical Recipes in C",
// section 6.2: erfc's Chebyshev fit.)
FUSEDPEFT_INLINE F normal_of(F x) {
  const F z = abs_of(x) * 0.70710678f, t = 1.0f / fma(z, all(0.5f), all(1.0f));
  F p = all(0.17087277f);
  p = fma(p, t, all(-0.82215223f));
  p = fma(p, t, all(1.48851587f));
  p = fma(p, t, all(-1.13520398f));
  p = fma(p, t, all(0.27886807f));
  p = fma(p, t, all(-0.18628806f));
  p = fma(p, t, all(0.09678418f));
  p = fma(p, t, all(0.37409196f));
  p = fma(p, t, all(1.00002368f));
  p = fma(p, t, all(-1.26551223f));
  const F tail = 0.5f * t * exp_of(fma(-z, z, p));  // of erfc, halved: Phi(-|x|)
  return x < 0.0f ? tail : 1.0f - tail;
}

// --- activations --------------------------------------------------------------------------------

constexpr float kRoot = 0.79788456080286536f, kCubic = 0.044715f;  // of gelu's tanh form

FUSEDPEFT_INLINE F activation_of(int kind, F v) {
  switch (kind) {
    case kRelu: return v < 0.0f ? F{} : v;
    case kGelu: return v * normal_of(v);
    case kGeluTanh:
      return 0.5f * v * (1.0f + tanh_of(kRoot * fma(kCubic * v * v, v, v)));
    case kSilu: return v * sigmoid_of(v);
    case kTanh: return tanh_of(v);
    default: return v > 0.0f ? v : 0.01f * v;  // kLeakyRelu
  }
}

FUSEDPEFT_INLINE F slope_of(int kind, F v) {
  switch (kind) {
    case kRelu: return v > 0.0f ? all(1.0f) : F{};
    case kGelu: return fma(v * 0.39894228f, exp_of(-0.5f * v * v), normal_of(v));
    case kGeluTanh: {
      const F square = v * v, root = kRoot * fma(kCubic * square, v, v);
      const F inner = kRoot * fma(square, all(3.0f * kCubic), all(1.0f));
      const F power = exp_of(-2.0f * abs_of(root)), whole = 1.0f / (1.0f + power);
      const F curve = 4.0f * power * whole * whole;  // 1 - tanh^2, which rounds far from 0
      return 0.5f * (1.0f + tanh_of(root)) + 0.5f * v * curve * inner;
    }
    case kSilu: {
      const F s = sigmoid_of(v);
      return s * fma(v, 1.0f - s, all(1.0f));
    }
    case kTanh: {
      const F t = tanh_of(v);
      return 1.0f - t * t;
    }
    default: return v > 0.0f ? all(1.0f) : all(0.01f);
  }
}

}  // namespace
}  // namespace fusedpeft::cpu
