// LoRA's way down for a few tokens: s[m,r] = sum_k x[m,k] a[r,k], in fp32.
//
// A block owns MT tokens and RT ranks and the whole of K, so that sums have one fixed order and
// need no second launch. Its 256 threads stride over K in pieces of 8 elements, all loads of a step
// in flight at once; a warp reduces by shuffles, the block through shared memory. At one token each
// block reads one row of A: R blocks. At more, 4 x 4 tiles read x ceil(R/4) and A ceil(M/4) times,
// out of L2. Bytes from memory: (M + R) K in their dtypes and 4 M R; 2 M R K flops.
#include "cuda/lora_shrink.h"

#include "checks.h"
#include "cuda/device.h"

namespace fusedpeft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;

template <class X, class A, int MT, int RT>
__global__ void __launch_bounds__(kThreads)
    lora_shrink_kernel(const X* __restrict__ x, const A* __restrict__ a, float* __restrict__ s,
                       int m, int k, int r, int64_t sx, int64_t sa, int64_t ss, bool aligned) {
  const int row0 = blockIdx.y * MT, rank0 = blockIdx.x * RT;
  // Rows past the end read the last one again: cheaper than a mask on every load.
  const X* x_row[MT];
  const A* a_row[RT];
#pragma unroll
  for (int i = 0; i < MT; ++i) x_row[i] = x + min(row0 + i, m - 1) * sx;
#pragma unroll
  for (int j = 0; j < RT; ++j) a_row[j] = a + min(rank0 + j, r - 1) * sa;

  float sums[MT * RT] = {};  // [MT, RT]
  const int whole = aligned ? k / kPiece * kPiece : 0;
  for (int at = threadIdx.x * kPiece; at < whole; at += kThreads * kPiece) {
    Vec<X, kPiece> xs[MT];
    Vec<A, kPiece> as[RT];
#pragma unroll
    for (int i = 0; i < MT; ++i) xs[i] = load<kPiece>(x_row[i] + at);
#pragma unroll
    for (int j = 0; j < RT; ++j) as[j] = load<kPiece>(a_row[j] + at);
#pragma unroll
    for (int e = 0; e < kPiece; ++e)
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < RT; ++j)
          sums[i * RT + j] += to_float(xs[i].v[e]) * to_float(as[j].v[e]);
  }
#pragma unroll 1
  for (int at = whole + threadIdx.x; at < k; at += kThreads)  // the rest, or all where unaligned
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < RT; ++j)
        sums[i * RT + j] += to_float(x_row[i][at]) * to_float(a_row[j][at]);

  constexpr int kWarps = kThreads / kWarp, kLanes = kWarp / (MT * RT);
  __shared__ float partial[kWarps][MT * RT];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float sum = warp_sums(sums);
  if (lane % kLanes == 0) partial[warp][lane / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x < MT * RT) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w][threadIdx.x];
    const int row = row0 + threadIdx.x / RT, rank = rank0 + threadIdx.x % RT;
    if (row < m && rank < r) s[row * ss + rank] = total;
  }
}

template <class T>
bool pieces_aligned(const T* p, int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

template <int MT, int RT, class X, class A>
void launch(const X* x, const A* a, float* s, int64_t m, int64_t k, int64_t r, int64_t sx,
            int64_t sa, int64_t ss, cudaStream_t stream) {
  const dim3 grid((r + RT - 1) / RT, (m + MT - 1) / MT);
  const bool aligned = pieces_aligned(x, sx) && pieces_aligned(a, sa);
  FP_LAUNCH((lora_shrink_kernel<X, A, MT, RT>), grid, kThreads, 0, stream, x, a, s, int(m), int(k),
            int(r), sx, sa, ss, aligned);
}

template <class X, class A>
void dispatch(const void* x_, const void* a_, void* s_, int64_t m, int64_t k, int64_t r, int64_t sx,
              int64_t sa, int64_t ss, void* stream_) {
  const auto* x = static_cast<const X*>(x_);
  const auto* a = static_cast<const A*>(a_);
  auto* s = static_cast<float*>(s_);
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (m == 1) {
    launch<1, 1>(x, a, s, m, k, r, sx, sa, ss, stream);
  } else if (m <= 4) {
    launch<4, 1>(x, a, s, m, k, r, sx, sa, ss, stream);
  } else {
    launch<4, 4>(x, a, s, m, k, r, sx, sa, ss, stream);
  }
}

}  // namespace

void lora_shrink(const void* x, const void* a, void* s, int64_t m, int64_t k, int64_t r, int64_t sx,
                 int64_t sa, int64_t ss, int dtype, int adapter_dtype, void* stream) {
  constexpr int64_t kMost = int64_t{1} << 30;  // loop counters are 32 bits; offsets are 64
  check(m >= 0 && m <= 4 * 65535, "m: expected 0 <= m <= 262140, got ", m);
  check(k >= 0 && k <= kMost, "k: expected 0 <= k <= 2^30, got ", k);
  check(r >= 0 && r <= kMost, "r: expected 0 <= r <= 2^30, got ", r);
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected a code 0..2, got ", dtype);
  check(adapter_dtype == dtype || adapter_dtype == kFloat32,
        "adapter_dtype: expected x's or fp32 (0), got ", adapter_dtype, " beside ", dtype);
  if (m == 0 || r == 0) return;
  const bool same = adapter_dtype == dtype;
  auto run = dispatch<float, float>;
  if (dtype == kBFloat16) {
    run = same ? dispatch<__nv_bfloat16, __nv_bfloat16> : dispatch<__nv_bfloat16, float>;
  } else if (dtype == kFloat16) {
    run = same ? dispatch<__half, __half> : dispatch<__half, float>;
  }
  run(x, a, s, m, k, r, sx, sa, ss, stream);
}

}  // namespace fusedpeft::cuda
