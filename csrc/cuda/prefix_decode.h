// Attention of a few query tokens over prefixes that requests share and over keys of their own: plain
// pointers into GPU memory, sizes and a stream (cudaStream_t as void*); no Python, no CUDA header.
//
// Neither allocates nor waits for the GPU nor reads a slot on the host, so that it can be captured in
// a graph and replayed with other slots, lengths and block tables. Throws std::invalid_argument for
// sizes or dtype codes; std::runtime_error, with the kernel's name, where a launch failed.
#pragma once

#include <cstdint>

namespace fusedpeft::cuda {

struct PrefixDecode {
  // Keys or values: elements from one request (block, slot) to the next, then head, then token.
  struct Keys {
    const void* data;
    int64_t outer, head, token;
  };
  const void* q;  // [b, h, t, d] contiguous
  Keys k, v, pk, pv;
  const int32_t *slots, *prefix_length;  // [b], -1: no prefix; [slot_count]
  const int32_t *lengths, *table;        // [b], null: s; [b, blocks], null: dense
  void* out;                             // as q
  float *lse, *work;                     // [b, h, t]; b h t (prefix_splits + splits) (d + 2) floats
  int b, h, hkv, t, s, d;
  int slot_count, max_prefix;
  int64_t table_stride;
  int block, block_count;
  int prefix_splits, splits;  // blocks that share the longest prefix, and the keys of a request
  float scale;
  int window;  // keys of its own that a query sees; 0: all
  int dtype;   // as in pyext/ops/native.py
};

// out and lse (natural logarithm). A request whose slot is free or out of range, whose length is
// beyond s, or whose keys are in a block that is not there: NaN.
void prefix_decode(const PrefixDecode& a, void* stream);

}  // namespace fusedpeft::cuda
