// What dispatch.cpp and the files of the instruction sets share: calls, and their entry points.
#pragma once

#include "cpu.h"

namespace fusedpeft::cpu {

struct Decode {
  const void *x, *w, *a, *b, *bias;
  void* y;
  int64_t m, k, n, r;
  int64_t sx, sw, sa, sb, sy;
  float scale;
  int dtype, adapter_dtype;
};

struct Dropout {
  const void* x;
  void* out;
  int64_t rows, cols, sx, so;
  double p;
  uint64_t seed;
  int dtype;
};

constexpr int64_t kMaxTokens = 64;  // of one call of `adapters`
constexpr int64_t kRankStep = 8;    // pyext/ops/slots.py

namespace portable {
void adapters(const Adapters& a);
void decode(const Decode& d);
void dropout(const Dropout& d);
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
void adapters(const Adapters& a);
void decode(const Decode& d);
void dropout(const Dropout& d);
}  // namespace avx2
namespace avx512 {
void adapters(const Adapters& a);
void decode(const Decode& d);
void dropout(const Dropout& d);
}  // namespace avx512
namespace avx512_bf16 {
void adapters(const Adapters& a);  // of bf16 and without a norm; the rest is avx512's
void decode(const Decode& d);  // in bf16; the rest is avx512's
}  // namespace avx512_bf16
#endif

// Memory of the calling thread that lives until its next call; 64-byte aligned.
void* scratch(int64_t bytes);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fusedpeft::cpu
