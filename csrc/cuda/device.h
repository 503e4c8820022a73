// What the kernels share: 16-byte loads, conversions to fp32, sums over a warp, tensor cores,
// asynchronous copies, flags between blocks. What is PTX here is C++ in csrc/simt.
#pragma once

#include <type_traits>

#include "cuda/launch.h"

namespace fusedpeft::cuda {

constexpr int kWarp = 32;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline void store(float v, float* p) { *p = v; }
__device__ inline void store(float v, __nv_bfloat16* p) { *p = __float2bfloat16(v); }
__device__ inline void store(float v, __half* p) { *p = __float2half(v); }

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

#ifndef FUSEDPEFT_SIMT
// D += A B over a warp: A [16, 16], B [16, 8] of T = __half or __nv_bfloat16, D [16, 8] in fp32. With
// g = lane / 4, t = lane % 4: a[0..3] are A's rows g, g + 8, g, g + 8 at columns 2 t, 2 t, 2 t + 8,
// 2 t + 8 and one on; b[0], b[1] B's column g at k = 2 t, 2 t + 8 and one on; d[0..3] D's rows g, g,
// g + 8, g + 8 at columns 2 t, 2 t + 1, 2 t, 2 t + 1.
template <class T>
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#define FP_MMA(type)                                                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "        \
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                         \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) {
    FP_MMA("f16");
  } else {
    FP_MMA("bf16");
  }
#undef FP_MMA
}

__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ inline std::size_t global_address(const void* p) { return __cvta_generic_to_global(p); }

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lanes 8 i .. 8 i + 7 name the rows of
// matrix i (16 bytes each, at whole 16 bytes); r[i] is its row lane / 4, columns 2 (lane % 4) and
// one on, or with kTransposed rows and columns swapped.
template <bool kTransposed = false>
__device__ inline void ldmatrix(unsigned (&r)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// 16 bytes that this block reads once and nobody writes: past the L1 cache.
__device__ inline uint4 load_once(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(global_address(p)));
  return v;
}
// Has the L2 fetch the line of an address, and waits for nothing.
__device__ inline void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global_address(p)));
}

// Begins a copy of 16 bytes past the L1 cache, both addresses at whole 16 bytes; of the source only
// `bytes` are read, the rest becomes zero. It is there, for this thread, after the wait for its
// group; for the others after a barrier behind that.
__device__ inline void cp_async16(void* shared, const void* global, unsigned bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global_address(global)), "r"(bytes)
               : "memory");
}
// Closes the group of the copies begun since the last call; a group may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kLeft of this thread's groups are unfinished.
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Flags in global memory. What a thread wrote before store_release or add_release is there for one
// that has read the new value with load_acquire; __syncthreads carries this to the whole of either
// block, the writers' before and the readers' after.
__device__ inline unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(v)
               : "l"(global_address(p))
               : "memory");
  return v;
}
__device__ inline void store_release(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global_address(p)), "r"(v) : "memory");
}
__device__ inline void add_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global_address(p)), "r"(v) : "memory");
}
// A number that is its own flag: seen by other blocks at some time, and orders nothing else.
__device__ inline unsigned load_relaxed(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(global_address(p)) : "memory");
  return v;
}
__device__ inline void store_relaxed(unsigned* p, unsigned v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(global_address(p)), "r"(v) : "memory");
}
#endif

// Waits in one thread until `*flag` is `value`; a __syncthreads behind it holds the block.
__device__ inline void wait_for(const unsigned* flag, unsigned value) {
  while (load_acquire(flag) != value) __nanosleep(32);
}

}  // namespace fusedpeft::cuda
