// What every .cu file includes: CUDA, or csrc/simt which runs the same source on a CPU, and the one
// way to launch a kernel.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fusedpeft::cuda {

// "(shrink_kernel<X, 4>)", as a macro sees it -> "shrink_kernel".
inline std::string kernel_name(const std::string& text) {
  const std::size_t first = text.find_first_not_of("( ");
  return text.substr(first, text.find_first_of("<) ", first) - first);
}

}  // namespace fusedpeft::cuda

#ifdef FUSEDPEFT_SIMT
#include <simt/simt.h>  // in <>, as bench/sources.py hashes what a GPU runs, and this is not
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// FP_LAUNCH((kernel<float, 4>), grid, block, dynamic shared bytes, stream, arguments...)
#define FP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)         \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::fusedpeft::cuda::check_launch(#kernel, cudaGetLastError());         \
  } while (0)
#define FP_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

namespace fusedpeft::cuda {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // pyext/ops/native.py

#ifndef FUSEDPEFT_SIMT
// Also reports an error that an earlier asynchronous call left behind: it names where it surfaced.
inline void check_launch(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(kernel_name(kernel) + ": " + cudaGetErrorString(error));
}
#endif

}  // namespace fusedpeft::cuda
