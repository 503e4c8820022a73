// The kernels for AVX-512 (F, BW, DQ, VL): 16 floats, 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "isa.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

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
#include "dropout.h"
#include "multi_lora.h"
#include "prefix_decode.h"

namespace fusedpeft::cpu::avx512 {

void adapters(const Adapters& a) { adapters_any(a); }
void decode(const Decode& d) { decode_any(d); }
void dropout(const Dropout& d) { dropout_any(d); }
void prefix_decode(const PrefixDecode& d) { prefix_decode_any(d); }
void multi_lora(const MultiLora& d) { multi_any(d); }

}  // namespace fusedpeft::cpu::avx512

#endif
