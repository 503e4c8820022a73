// Kernels that are wrong, one fault each, where a GPU would be silent; and some that are right.
// argv names one; what must come of it is in test_simt_faults.py.
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>

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

template <class T>
__device__ void product(const float* in, float* out) {  // right: A [16, 16] B [16, 8], one warp
  __shared__ __align__(16) unsigned short a[16 * 16], b[16 * 8];
  const int t = threadIdx.x;
  const auto put = [](unsigned short* to, float v) {
    T narrow;
    if constexpr (std::is_same_v<T, __half>) {
      narrow = __float2half(v);
    } else {
      narrow = __float2bfloat16(v);
    }
    std::memcpy(to, &narrow, 2);
  };
  for (int i = t; i < 256; i += 32) put(a + i, in[i % 127]);
  for (int i = t; i < 128; i += 32) put(b + i, in[i]);
  __syncwarp();
  unsigned as[4], bs[4];
  fusedpeft::cuda::ldmatrix(as, a + t % 16 * 16 + t / 16 * 8);
  fusedpeft::cuda::ldmatrix<true>(bs, b + t % 16 * 8);
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  fusedpeft::cuda::mma<T>(d, as, {bs[0], bs[1]});
  for (int i = 0; i < 4; ++i) out[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = d[i];
}
__global__ void product_fp16(const float* in, float* out) { product<__half>(in, out); }
__global__ void product_bf16(const float* in, float* out) { product<__nv_bfloat16>(in, out); }

__global__ void divergent_mma(const float*, float* out) {
  float d[4] = {};
  if (threadIdx.x != 40) fusedpeft::cuda::mma<__half>(d, {}, {});
  out[threadIdx.x] = d[0];
}

__global__ void mma_of_half_a_warp(const float*, float* out) {  // with 40 threads
  float d[4] = {};
  fusedpeft::cuda::mma<__half>(d, {}, {});
  out[threadIdx.x] = d[0];
}

// Copies `in` in two groups of 16 bytes a thread, of which one is still on its way when the other
// is read; kFault leaves one thing out.
enum Fault { kNone, kNoWait, kWaitTooEarly, kNoBarrier, kNoBarrierAfterReading, kNeverWaited };
template <Fault kFault>
__device__ void pipeline(const float* in, float* out) {
  using namespace fusedpeft::cuda;
  __shared__ __align__(16) float shared[2][kThreads];
  const int t = threadIdx.x, other = kThreads - 1 - t, base = blockIdx.x * kThreads;
  if (t < 16) cp_async16(&shared[0][4 * t], in + 4 * t);
  cp_async_commit();
  if (t < 16) cp_async16(&shared[1][4 * t], in + kThreads + 4 * t, t == 15 ? 12 : 16);
  cp_async_commit();
  if (kFault != kNoWait) cp_async_wait<kFault == kWaitTooEarly ? 2 : 1>();
  if (kFault != kNoBarrier) __syncthreads();
  float v = shared[0][other];
  if (kFault != kNoBarrierAfterReading) __syncthreads();
  if (t < 16) cp_async16(&shared[0][4 * t], in + 4 * t);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  v += 1000.0f * shared[1][other];
  if (kFault == kNeverWaited) return;
  cp_async_wait<0>();
  out[base + t] = v;
}
__global__ void copies(const float* in, float* out) { pipeline<kNone>(in, out); }
__global__ void copy_read_at_once(const float* in, float* out) { pipeline<kNoWait>(in, out); }
__global__ void copy_read_early(const float* in, float* out) { pipeline<kWaitTooEarly>(in, out); }
__global__ void copy_no_barrier(const float* in, float* out) { pipeline<kNoBarrier>(in, out); }
__global__ void copy_over_readers(const float* in, float* out) {
  pipeline<kNoBarrierAfterReading>(in, out);
}
__global__ void copy_never_waited(const float* in, float* out) { pipeline<kNeverWaited>(in, out); }

__global__ void copy_to(const float* in, float* out, int where) {
  __shared__ __align__(16) float shared[8];
  fusedpeft::cuda::cp_async16(where < 0 ? out : shared + where, in + threadIdx.x / 8 * 4);
  fusedpeft::cuda::cp_async_commit();
  fusedpeft::cuda::cp_async_wait<0>();
}

// Each block but the first waits for a flag; `step` blocks before it.
__global__ void flag(unsigned* flags, float* out, int step) {
  using namespace fusedpeft::cuda;
  const int b = blockIdx.x, from = b - step;
  if (from >= 0 && from < kBlocks && threadIdx.x == 3) wait_for(flags + from, 7);
  __syncthreads();
  out[b * kThreads + threadIdx.x] = b == 0 ? 5.0f : out[threadIdx.x] + 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) store_release(flags + b, 7);
}

// Lanes of a block wait for each other, one after the other.
__global__ void flags_in_a_block(unsigned* flags, float* out) {
  using namespace fusedpeft::cuda;
  const int t = threadIdx.x;
  if (t + 1 < kThreads) wait_for(flags + blockIdx.x, kThreads - 1 - t);
  out[blockIdx.x * kThreads + t] = 1.0f;
  add_release(flags + blockIdx.x, 1);
}

}  // namespace

int main(int, char** argv) {
  const std::unique_ptr<float[]> in(new float[kBlocks * kThreads]);
  const std::unique_ptr<float[]> out(new float[kBlocks * kThreads]);
  for (int i = 0; i < kBlocks * kThreads; ++i) in[i] = float(i), out[i] = 0.0f;
  const std::unique_ptr<float[]> exact(new float[kThreads]());
  const std::unique_ptr<unsigned[]> flags(new unsigned[kBlocks]());
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
    RUN(product_fp16, in.get(), 1, 32, 0)
    RUN(product_bf16, in.get(), 1, 32, 0)
    RUN(divergent_mma, in.get(), 1, kThreads, 0)
    RUN(mma_of_half_a_warp, in.get(), 1, 40, 0)
    RUN(copies, in.get(), kBlocks, kThreads, 0)
    RUN(copy_read_at_once, in.get(), kBlocks, kThreads, 0)
    RUN(copy_read_early, in.get(), kBlocks, kThreads, 0)
    RUN(copy_no_barrier, in.get(), kBlocks, kThreads, 0)
    RUN(copy_over_readers, in.get(), kBlocks, kThreads, 0)
    RUN(copy_never_waited, in.get(), kBlocks, kThreads, 0)
    RUN(flags_in_a_block, flags.get(), kBlocks, kThreads, 0)
#undef RUN
#define RUN(name, kernel, ...)                                                                \
  if (!std::strcmp(argv[1], name)) {                                                          \
    known = true;                                                                             \
    FP_LAUNCH(kernel, kBlocks, kThreads, 0, nullptr, __VA_ARGS__);                            \
  }
    RUN("copy_past_global", copy_to, exact.get() + kThreads - 28, out.get(), 4)
    RUN("copy_to_global", copy_to, in.get(), out.get(), -1)
    RUN("copy_to_the_middle", copy_to, in.get(), out.get(), 1)
    RUN("copy_from_the_middle", copy_to, in.get() + 1, out.get(), 0)
    RUN("copy_twice", copy_to, in.get(), out.get(), 0)
    RUN("flag_of_an_earlier_block", flag, flags.get(), out.get(), 1)
    RUN("flag_of_a_later_block", flag, flags.get(), out.get(), -1)
    RUN("flag_of_its_own_block", flag, flags.get(), out.get(), 0)
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
