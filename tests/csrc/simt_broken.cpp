// Kernels that are wrong, one fault each, where a GPU would be silent; and some that are right.
// argv names one; what must come of it is in test_simt_faults.py.
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cuda/device.h"

namespace {

constexpr int kBlocks = 2, kThreads = 64;

__global__ void fine(const float* in, float* out) {  // a reversal through shared memory, and a sum
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = in[blockIdx.x * kThreads + t];
  __syncthreads();
  float v = shared[kThreads - 1 - t];
  for (int by = 16; by > 0; by /= 2) v += __shfl_down_sync(0xffffffffu, v, by);
  out[blockIdx.x * kThreads + t] = v;
}

__global__ void race(const float* in, float* out) {  // no barrier
  __shared__ float shared[kThreads];
  const int t = threadIdx.x;
  shared[t] = in[t];
  out[blockIdx.x * kThreads + t] = shared[kThreads - 1 - t];
}

__global__ void race_through_shuffle(const float* in, float* out) {  // a shuffle is no fence
  __shared__ float shared[kThreads];
  const int t = threadIdx.x, warp = t / 32 * 32;
  shared[t] = in[t];
  const float v = __shfl_xor_sync(0xffffffffu, in[t], 1);
  out[blockIdx.x * kThreads + t] = v + shared[warp + (t + 1) % 32];
}

__global__ void race_on_global(const float* in, float* out) {
  out[blockIdx.x * kThreads + threadIdx.x % 63] = in[threadIdx.x];
}

__global__ void warp_synchronous(const float* in, float* out) {  // right, with __syncwarp
  __shared__ float shared[kThreads];
  const int t = threadIdx.x, warp = t / 32 * 32;
  shared[t] = in[t];
  __syncwarp();
  out[blockIdx.x * kThreads + t] = shared[warp + (t + 1) % 32];
}

__global__ void exit_before_barrier(const float* in, float* out) {
  if (blockIdx.x == 1 && threadIdx.x == 7) return;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

__global__ void divergent_shuffle(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);
  out[blockIdx.x * kThreads + threadIdx.x] = v;
}

__global__ void lane_not_in_mask(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v += __shfl_down_sync(0x0000ffffu, v, 1);
  out[blockIdx.x * kThreads + threadIdx.x] = v;
}

__global__ void two_operations(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) {
    __ballot_sync(0xffffffffu, true);
  } else {
    __syncwarp();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

__global__ void outside_its_mask(const float* in, float* out) {
  __syncwarp(0x0000ffffu);
  out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

__global__ void partial_warp(const float* in, float* out) {  // right, with 40 threads
  const float v = in[threadIdx.x];
  out[blockIdx.x * kThreads + threadIdx.x] = v + __shfl_xor_sync(0xffffffffu, v, 1);
}

__global__ void past_static_shared(const float* in, float* out) {
  __shared__ float shared[kThreads];
  float* all = shared;  // a pointer: the array's own bound would be UndefinedBehaviorSanitizer's
  all[threadIdx.x + (blockIdx.x == 1)] = in[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x];
}

__global__ void past_dynamic_shared(const float* in, float* out) {
  FP_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x];
}

__global__ void past_global(const float* in, float* out) {
  out[blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x + blockIdx.x * 33];
}

__global__ void past_local(const float* in, float* out) {
  float local[4];
  for (int i = 0; i < 4; ++i) local[i] = in[i];
  __syncthreads();
  const volatile float* all = local;
  out[blockIdx.x * kThreads + threadIdx.x] = all[threadIdx.x == 63 ? 4 : 0];
}

__global__ void misaligned(const float* in, float* out) {
  out[blockIdx.x * kThreads + threadIdx.x] =
      fusedpeft::cuda::load<4>(in + threadIdx.x % 8 * 4 + (threadIdx.x == 5)).v[0];
}

__global__ void unwritten_shared(const float* in, float* out) {
  __shared__ float shared[kThreads];
  if (threadIdx.x != 9) shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x];
}

__global__ void counts(const float*, float* out) {  // atomics order nothing else, but are no race
  atomicAdd(out, 1.0f);
}

}  // namespace

int main(int, char** argv) {
  const std::unique_ptr<float[]> in(new float[kBlocks * kThreads]);
  const std::unique_ptr<float[]> out(new float[kBlocks * kThreads]);
  for (int i = 0; i < kBlocks * kThreads; ++i) in[i] = float(i), out[i] = 0.0f;
  const std::unique_ptr<float[]> exact(new float[kThreads]());
  bool known = false;
  try {
#define RUN(kernel, input, grid, threads, bytes)                                              \
  if (!std::strcmp(argv[1], #kernel)) {                                                       \
    known = true;                                                                             \
    FP_LAUNCH(kernel, grid, threads, bytes, nullptr, input, out.get());                       \
  }
    RUN(fine, in.get(), kBlocks, kThreads, 0)
    RUN(race, in.get(), kBlocks, kThreads, 0)
    RUN(race_through_shuffle, in.get(), kBlocks, kThreads, 0)
    RUN(race_on_global, in.get(), kBlocks, kThreads, 0)
    RUN(warp_synchronous, in.get(), kBlocks, kThreads, 0)
    RUN(exit_before_barrier, in.get(), kBlocks, kThreads, 0)
    RUN(two_barriers, in.get(), kBlocks, kThreads, 0)
    RUN(divergent_shuffle, in.get(), kBlocks, kThreads, 0)
    RUN(lane_not_in_mask, in.get(), kBlocks, kThreads, 0)
    RUN(two_operations, in.get(), kBlocks, kThreads, 0)
    RUN(outside_its_mask, in.get(), kBlocks, kThreads, 0)
    RUN(partial_warp, in.get(), kBlocks, 40, 0)
    RUN(past_static_shared, in.get(), kBlocks, kThreads, 0)
    RUN(past_dynamic_shared, in.get(), kBlocks, kThreads, kThreads * sizeof(float) - 4)
    RUN(past_global, exact.get(), kBlocks, kThreads, 0)
    RUN(past_local, in.get(), kBlocks, kThreads, 0)
    RUN(misaligned, in.get(), kBlocks, kThreads, 0)
    RUN(unwritten_shared, in.get(), kBlocks, kThreads, 0)
    RUN(counts, in.get(), kBlocks, kThreads, 0)
    if (!std::strcmp(argv[1], "too_many_threads")) {
      known = true;
      FP_LAUNCH(fine, 1, 1025, 0, nullptr, in.get(), out.get());
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "threw %s\n", e.what());
    return 3;
  }
  for (int i = 0; i < kBlocks * kThreads; ++i) std::printf("%g ", out[i]);
  return known ? 0 : 4;
}
