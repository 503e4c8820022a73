// Decode in bf16 for AVX-512 with BF16: as decode_avx512.cpp, pairs multiplied as they lie in memory.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "isa.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace fusedpeft::cpu {
namespace {

constexpr int kWidth = 16, kRegisters = 32;
constexpr bool kHalvesInOrder = true;
typedef __m512 F;

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

template <int part>
inline F half(const Float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part));
}

}  // namespace
}  // namespace fusedpeft::cpu

#include "adapter_decode.h"
#include "decode.h"
#include "multi_lora.h"

namespace fusedpeft::cpu {
namespace {

// The product of bf16 rows without unpacking: each lane adds two products to its fp32 sum.
struct Pairs {
  using Element = BFloat16;
  using Packed = BFloat16;
  static constexpr int kParts = 1, kBlock = 2 * kWidth;

  template <int>
  static FUSEDPEFT_INLINE __m512bh load(const BFloat16* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static FUSEDPEFT_INLINE F mac(__m512bh w, __m512bh x, F acc) {
    return _mm512_dpbf16_ps(acc, w, x);
  }
  static FUSEDPEFT_INLINE void pack(const BFloat16* from, BFloat16* to) {
    __builtin_memcpy(to, from, kBlock * sizeof *to);
  }
};

}  // namespace
}  // namespace fusedpeft::cpu

namespace fusedpeft::cpu::avx512_bf16 {

void adapters(const Adapters& a) { AdapterCall<BFloat16, BFloat16, Pairs>(a).run(); }

void decode(const Decode& d) {
  if (d.adapter_dtype == kBFloat16) return decode_as<BFloat16, BFloat16, Pairs, Pairs>(d);
  return decode_as<BFloat16, float, Pairs, Wide<float>>(d);
}

void multi_lora(const MultiLora& d) {
  if (d.adapter_dtype == kBFloat16) return MultiCall<BFloat16, BFloat16, Pairs, Pairs>(d).run();
  return MultiCall<BFloat16, float, Pairs, Wide<float>>(d).run();
}

}  // namespace fusedpeft::cpu::avx512_bf16

#endif
