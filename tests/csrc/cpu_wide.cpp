// The kernels at AVX-512's width and register count on any chip, in place of portable.cpp: what
// groups of 6 tokens, 8 rows and blocks of 32 do, and the bf16 pairs of avx512_bf16.cpp with their
// one instruction spelt out.
#include <omp.h>

#include "cpu/isa.h"

namespace fusedpeft::cpu {
namespace {

constexpr int kWidth = 16, kRegisters = 32;
constexpr bool kHalvesInOrder = true;
typedef float F __attribute__((vector_size(64)));

inline F fma(F a, F b, F c) { return a * b + c; }

template <int part>
F half(const Float16* p);

}  // namespace
}  // namespace fusedpeft::cpu

#include "cpu/adapter_decode.h"
#include "cpu/decode.h"
#include "cpu/dropout.h"
#include "cpu/multi_lora.h"
#include "cpu/prefix_decode.h"

namespace fusedpeft::cpu {
namespace {

template <int part>
F half(const Float16* p) {
  F v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[part * kWidth + i]);
  return v;
}

struct Pairs {
  using Element = BFloat16;
  using Packed = BFloat16;
  static constexpr int kParts = 1, kBlock = 2 * kWidth;
  struct V {
    BFloat16 at[kBlock];
  };

  template <int>
  static V load(const BFloat16* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static F mac(const V& w, const V& x, F acc) {
    for (int i = 0; i < kBlock; ++i) acc[i / 2] += to_float(w.at[i]) * to_float(x.at[i]);
    return acc;
  }
  static void pack(const BFloat16* from, BFloat16* to) {
    __builtin_memcpy(to, from, kBlock * sizeof *to);
  }
};

}  // namespace

namespace portable {

void adapters(const Adapters& a) {
  if (a.dtype != kBFloat16 || a.adapter_dtype != kBFloat16 || a.norm) return adapters_any(a);
  return AdapterCall<BFloat16, BFloat16, Pairs>(a).run();
}
void decode(const Decode& d) {
  if (d.dtype != kBFloat16) return decode_any(d);
  if (d.adapter_dtype == kBFloat16) return decode_as<BFloat16, BFloat16, Pairs, Pairs>(d);
  return decode_as<BFloat16, float, Pairs, Wide<float>>(d);
}
void dropout(const Dropout& d) { dropout_any(d); }
void prefix_decode(const PrefixDecode& d) { prefix_decode_any(d); }
void multi_lora(const MultiLora& d) {
  if (d.dtype != kBFloat16) return multi_any(d);
  if (d.adapter_dtype == kBFloat16) return MultiCall<BFloat16, BFloat16, Pairs, Pairs>(d).run();
  return MultiCall<BFloat16, float, Pairs, Wide<float>>(d).run();
}

}  // namespace portable
}  // namespace fusedpeft::cpu
