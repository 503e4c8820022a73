// LoRA's way down for a few tokens: plain pointers into GPU memory, sizes and a stream (cudaStream_t
// as void*); no Python, no torch, no CUDA header.
//
// Matrices are row-major with unit inner stride; s* is the distance between rows, in elements.
// Neither allocates nor waits for the GPU, so that it can be captured in a graph. Throws
// std::invalid_argument for sizes or dtype codes; std::runtime_error, with the kernel's name, where
// the launch failed.
#pragma once

#include <cstdint>

namespace fusedpeft::cuda {

// s[m,r] = x[m,k] a[r,k]^T, accumulated and stored in fp32. Made for m <= 64; any m, k, r >= 0.
// dtype, adapter_dtype: codes as in pyext/ops/native.py; `a` is of x's dtype or fp32.
void lora_shrink(const void* x, const void* a, void* s, int64_t m, int64_t k, int64_t r, int64_t sx,
                 int64_t sa, int64_t ss, int dtype, int adapter_dtype, void* stream);

}  // namespace fusedpeft::cuda
