// The frozen linear and every token's own LoRA, or one for all, in one launch: plain pointers into GPU
// memory, sizes and a stream (cudaStream_t as void*); no Python, no torch, no CUDA header.
//
// Neither waits for the GPU nor reads a slot or a rank on the host, so that it can be captured in a
// graph and replayed with other slots. Allocates nothing but its workspace.h, at a first call. Throws
// std::invalid_argument for sizes or dtype codes; std::runtime_error, with the kernel's name, where
// the launch failed.
#pragma once

#include <cstdint>

namespace fusedpeft::cuda {

constexpr int kMaxParts = 16;   // linears that are stacked
constexpr int kMostTokens = 64;

struct MultiLora {
  const void *x, *w, *bias;  // [m, k], [n, k], [n] or null; of one dtype
  void* y;                   // [m, n] contiguous, as x
  const int32_t* slots;      // [m], -1: the base alone; null: slot 0 for all
  const void *a, *b;         // as pyext/ops/slots.py lays them out; of x's dtype or fp32
  const int32_t* rank;       // [count, parts], -1: free; null: max_rank everywhere
  const float* scale;        // [count, parts]; null: one_scale everywhere
  float *s, *sums;           // [m, parts, max_rank]; [splits - 1, m, n]: scratch
  int64_t sizes[kMaxParts];  // rows of W of each part
  int64_t n, sx, sw;         // elements between rows
  int64_t a_slot, a_row, b_slot;
  int m, k, count, parts, max_rank;
  int processors, splits;    // of the GPU; of K, by blocks of their own
  int dtype, adapter_dtype;  // as in pyext/ops/native.py
  float one_scale;
};

// y_m = W x_m + bias + scale_s B_s (A_s x_m) with s = slots[m], part by part; m <= 64. A token whose
// slot is free or out of range: NaN. Two launches that share scratch must follow each other.
void multi_lora(const MultiLora& a, void* stream);

}  // namespace fusedpeft::cuda
