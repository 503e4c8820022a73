// The kernels for AVX2, FMA and F16C: 8 floats, 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "isa.h"

#pragma GCC target("avx2,fma,f16c")

namespace fusedpeft::cpu {
namespace {

constexpr int kWidth = 8, kRegisters = 16;
constexpr bool kHalvesInOrder = true;
typedef __m256 F;

inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

template <int part>
inline F half(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + part));
}

}  // namespace
}  // namespace fusedpeft::cpu

#include "adapter_decode.h"
#include "adapter_train.h"
#include "decode.h"
#include "dropout.h"
#include "multi_lora.h"
#include "prefix_decode.h"

namespace fusedpeft::cpu::avx2 {

void adapters(const Adapters& a) { adapters_any(a); }
void adapter_train(const AdapterTrain& a) { adapter_train_any(a); }
void decode(const Decode& d) { decode_any(d); }
void dropout(const Dropout& d) { dropout_any(d); }
void prefix_decode(const PrefixDecode& d) { prefix_decode_any(d); }
void multi_lora(const MultiLora& d) { multi_any(d); }

}  // namespace fusedpeft::cpu::avx2

#endif
