// What the kernels share: 16-byte loads, conversions to fp32, sums over a warp.
#pragma once

#include "cuda/launch.h"

namespace fusedpeft::cuda {

constexpr int kWarp = 32;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

// N elements that are loaded in transactions of 16 bytes; the address must be a multiple of 16.
template <class T, int N>
struct alignas(16) Vec {
  T v[N];
};

template <int N, class T>
__device__ inline Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}

// Sums each of v[0, N) over the warp in N + log2(32 / N) - 1 shuffles, where N reductions of one
// value take 5 N: at each step a lane hands half of its values over and keeps the other half.
// Returns the sum of value lane / (32 / N). N: a power of two up to 32.
template <int N>
__device__ inline float warp_sums(float (&v)[N]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int bit = kWarp / 2, half = N / 2; bit > 0; bit /= 2, half /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < (half > 0 ? half : 1); ++i) {
      const float keep = half > 0 && upper ? v[i + half] : v[i];
      const float give = half > 0 && !upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, bit);
    }
  }
  return v[0];
}

}  // namespace fusedpeft::cuda
