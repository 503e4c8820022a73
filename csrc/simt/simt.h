// Runs a .cu file on a CPU, for tests: compiled as C++ with -DFUSEDPEFT_SIMT, a thread of a block
// is a fiber and the blocks run one after the other. Included by cuda/launch.h.
//
// What is found, always with kernel, block and thread:
//   - a barrier or a warp operation that not all reach, or reach elsewhere: std::logic_error;
//   - reads and writes out of bounds, of global and of shared memory: -fsanitize=address;
//   - misaligned vectors, overflow: -fsanitize=undefined;
//   - races between the threads of a block, on shared and on global memory: -fsanitize=thread, to
//     which every fiber is a thread and only barriers, __syncwarp and atomics order them. A shuffle
//     and an mma order nothing, as on a GPU;
//   - shared memory read before it was written: it starts as 0xFF bytes, which is NaN (but g++ lets
//     no static variable of a template into the section: there FP_DYNAMIC_SHARED is the better);
//   - memory that a cp.async writes, read or written before the wait for it: -fsanitize=address; no
//     barrier after the wait: -fsanitize=thread. The copy is made at the wait, by its thread;
//   - a wait (__nanosleep in a loop) that nobody can end: std::logic_error. A flag of an earlier
//     block is there, one of a later block never comes: so nothing here must need it.
// What is not: races between blocks; a fence that is missing beside an atomic, as atomics are
// sequentially consistent here.
// simt.cpp is compiled without sanitizers, whichever the kernels have.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

// --- words of the language ----------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so its shared variables are plain statics; in a section of their own
// they can be filled before each block (-fsanitize-sections=simt_shared puts redzones between).
#define __shared__ static __attribute__((section("simt_shared")))

#define FP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                \
  do {                                                                           \
    (void)(stream);                                                              \
    ::simt::launch(::fusedpeft::cuda::kernel_name(#kernel), (grid), (block),     \
                   (shared_bytes), [&] { (kernel)(__VA_ARGS__); });              \
  } while (0)
#define FP_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::simt::dynamic_shared())

// --- types --------------------------------------------------------------------------------------
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half(float v) { return {static_cast<_Float16>(v)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float v) {  // to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return {0x7FFF};
  return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}

// --- the running thread -------------------------------------------------------------------------
inline uint3 threadIdx, blockIdx;  // set when a fiber is entered
inline dim3 blockDim, gridDim;

namespace simt {

struct Site {  // where a collective was called
  const char* what;
  const char* file;
  int line;
};

// Runs `body` once for each thread. std::runtime_error for a size that CUDA refuses, as a failed
// launch; std::logic_error for a barrier or a warp operation used wrongly.
void launch(const std::string& kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
            const std::function<void()>& body);
// This block's dynamic shared memory: exactly as many bytes as the launch asked for.
void* dynamic_shared();
// Waits for every thread of the block; one that has exited is missed.
void barrier(Site site);
// Waits for every lane of `mask`; returns what each of the 32 gave, good until this lane's next
// exchange. `orders`: whether memory written before is visible after (__syncwarp: yes).
const std::uint64_t* exchange(unsigned mask, std::uint64_t value, bool orders, Site site);
// Stops the launch: std::logic_error with the running thread's place in front.
[[noreturn]] void fail(Site site, const std::string& why);
bool takes_part(unsigned lane, unsigned mask);  // is in the mask, and this warp has it
void nap(Site site);                            // lets the others run

// Copies that this thread has begun: 16 bytes each, of which the last 16 - bytes become zero.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes, group;
  Site site;
};
void check_shared(const void* p, Site site);  // 16 bytes of shared memory at whole 16 bytes
void copy_later(const Copy& copy);
void commit_copies();
bool next_copy(unsigned left, Copy* copy);  // one that is due when `left` groups may stay open

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const std::uint64_t* all = exchange(mask, bits, false, site);
  if (!takes_part(source, mask))
    fail(site, "reads lane " + std::to_string(source) + ", which takes no part");
  std::memcpy(&value, all + source, sizeof value);
  return value;
}

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

}  // namespace simt

// --- collectives, with the caller's line --------------------------------------------------------
#define SIMT_SITE(name) \
  ::simt::Site { name, file, line }
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { simt::barrier(SIMT_SITE("__syncthreads")); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  simt::exchange(mask, 0, true, SIMT_SITE("__syncwarp"));
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_HERE) {
  const int base = simt::lane() / width * width;
  return simt::shuffle(mask, v, base + source % width, SIMT_SITE("__shfl_sync"));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, SIMT_HERE) {
  const int self = simt::lane(), from = self ^ bits;
  const bool inside = from / width <= self / width;
  return simt::shuffle(mask, v, inside ? from : self, SIMT_SITE("__shfl_xor_sync"));
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_HERE) {
  const int self = simt::lane(), from = self + by;
  const bool inside = from / width == self / width;
  return simt::shuffle(mask, v, inside ? from : self, SIMT_SITE("__shfl_down_sync"));
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_HERE) {
  const int self = simt::lane(), from = self - static_cast<int>(by);
  const bool inside = from >= self / width * width;
  return simt::shuffle(mask, v, inside ? from : self, SIMT_SITE("__shfl_up_sync"));
}
inline unsigned __ballot_sync(unsigned mask, bool v, SIMT_HERE) {
  const std::uint64_t* all = simt::exchange(mask, v, false, SIMT_SITE("__ballot_sync"));
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (simt::takes_part(i, mask) && all[i]) votes |= 1u << i;
  return votes;
}

inline void __nanosleep(unsigned, SIMT_HERE) { simt::nap(SIMT_SITE("__nanosleep")); }

// --- memory and arithmetic ----------------------------------------------------------------------
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T atomicExch(T* p, T v) {
  return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
template <class T>
T atomicAdd(T* p, T v) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_SEQ_CST);
  do {
    next = old + v;
  } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// --- what cuda/device.h does in PTX -------------------------------------------------------------
namespace simt {

inline float half_of(unsigned pair, int i, __half) {
  __half v[2];
  std::memcpy(v, &pair, sizeof v);
  return __half2float(v[i]);
}
inline float half_of(unsigned pair, int i, __nv_bfloat16) {
  return __bfloat162float({static_cast<std::uint16_t>(pair >> 16 * i)});
}

}  // namespace simt

namespace fusedpeft::cuda {

// Lane 4 g + t holds A's rows g and g + 8 at columns 2 t and 2 t + 8 (and one on), B's column g at
// the same k, and D's rows g and g + 8 at columns 2 t and one on.
template <class T>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIMT_HERE) {
  const simt::Site site = SIMT_SITE("mma");
  if (!simt::takes_part(31, ~0u)) simt::fail(site, "needs 32 lanes");
  std::uint64_t given[3][32];
  const unsigned mine[3][2] = {{a[0], a[1]}, {a[2], a[3]}, {b[0], b[1]}};
  for (int i = 0; i < 3; ++i) {
    const std::uint64_t both = mine[i][0] | std::uint64_t{mine[i][1]} << 32;
    std::memcpy(given[i], simt::exchange(~0u, both, false, site), sizeof given[i]);
  }
  const auto at = [&](int i, int lane, int row8, int k) {  // row8: which half of the 64 bits
    return simt::half_of(static_cast<unsigned>(given[i][lane] >> 32 * row8), k % 2, T{});
  };
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 4; ++i)
      d[i] += at(k / 8, 4 * g + k % 8 / 2, i / 2, k) *
              at(2, 4 * (2 * t + i % 2) + k % 8 / 2, k / 8, k);
}

// Matrix i is at the 8 addresses of lanes 8 i to 8 i + 7, a row of 8 each.
template <bool kTransposed = false>
void ldmatrix(unsigned (&r)[4], const void* row, SIMT_HERE) {
  const simt::Site site = SIMT_SITE("ldmatrix");
  if (!simt::takes_part(31, ~0u)) simt::fail(site, "needs 32 lanes");
  simt::check_shared(row, site);
  std::uint64_t rows[32];
  const auto mine = reinterpret_cast<std::uintptr_t>(row);
  std::memcpy(rows, simt::exchange(~0u, mine, false, site), sizeof rows);
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    r[i] = 0;
    for (int j = 0; j < 2; ++j) {
      const int at = kTransposed ? 2 * t + j : g, column = kTransposed ? g : 2 * t + j;
      r[i] |= unsigned{reinterpret_cast<const std::uint16_t*>(rows[8 * i + at])[column]} << 16 * j;
    }
  }
}

inline uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }
inline void prefetch(const void* p) { (void)*static_cast<const volatile char*>(p); }  // for ASan

inline void cp_async16(void* shared, const void* global, unsigned bytes = 16, SIMT_HERE) {
  const simt::Site site = SIMT_SITE("cp_async16");
  simt::check_shared(shared, site);
  if (reinterpret_cast<std::uintptr_t>(global) % 16)
    simt::fail(site, "reads at an address that is no multiple of 16");
  if (bytes > 16) simt::fail(site, "reads " + std::to_string(bytes) + " bytes of 16");
  const auto* from = static_cast<const volatile char*>(global);
  for (unsigned i = 0; i < bytes; ++i) (void)from[i];  // also now, for the sanitizers
  auto* to = static_cast<volatile char*>(shared);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<char>(0xFF);
  simt::copy_later({shared, global, bytes, 0, site});
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kLeft>
void cp_async_wait() {
  simt::Copy copy;
  while (simt::next_copy(kLeft, &copy)) {
    const auto* from = static_cast<const volatile char*>(copy.from);
    auto* to = static_cast<volatile char*>(copy.to);
    for (unsigned i = 0; i < 16; ++i) to[i] = i < copy.bytes ? from[i] : char{0};
  }
}

inline unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void store_release(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void add_release(unsigned* p, unsigned v) { __atomic_fetch_add(p, v, __ATOMIC_RELEASE); }
inline unsigned load_relaxed(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_relaxed(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }

}  // namespace fusedpeft::cuda
