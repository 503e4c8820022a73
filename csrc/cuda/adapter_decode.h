// Bottleneck adapters for a few tokens, each with its own: plain pointers into GPU memory, sizes and
// a stream (cudaStream_t as void*); no Python, no torch, no CUDA header.
//
// One launch, which reads no slot on the host, so that it can be captured in a graph and replayed
// with other slots and adapters. Allocates nothing but its workspace.h, at a first call. Throws
// std::invalid_argument for sizes or codes; std::runtime_error, with the kernel's name, where the
// launch failed.
#pragma once

#include <cstdint>

namespace fusedpeft::cuda {

// y[m,d] = residual + scale[s] * (act(norm(x) D^T + c) U^T + e) with s = slots[m]; residual (null: 0)
// where that is -1 or size[s] 0; NaN where there is no such slot or size[s] is -1 or beyond max_size. The adapters lie as
// AdapterSlots says (pyext/ops/slots.py).
struct AdapterDecode {
  const void *x, *residual;  // of dtype, as y, which is contiguous
  void* y;
  const int32_t *slots, *size;
  const float* scale;
  const void *down, *down_bias, *up, *up_bias, *norm_weight, *norm_bias;  // of adapter_dtype
  int64_t count, m, d, max_size;  // of slots, of tokens
  int64_t sx, sr;                 // between rows of x, of residual
  int64_t down_slot, down_bias_slot, up_slot, up_bias_slot;  // between slots
  int64_t norm_weight_slot, norm_bias_slot;
  float eps;
  int norm, activation, dtype, adapter_dtype;  // codes as in pyext/ops/native.py, adapter_native.py
  int processors;                              // of the GPU
};

constexpr int64_t kMostAdapterTokens = 256, kMostAdapterSize = 2048;

void adapter_decode(const AdapterDecode& a, void* stream);

}  // namespace fusedpeft::cuda
