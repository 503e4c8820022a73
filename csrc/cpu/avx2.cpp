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

struct Nf4Floats {
  static constexpr int kCount = 8;
  F low, high;  // the first eight numbers, the others

  explicit Nf4Floats(const float* from)
      : low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
  void put(const uint8_t* codes, float* out) const {  // a permutation looks at the low three bits
    int bytes;
    __builtin_memcpy(&bytes, codes, 4);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i at = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shift);
    const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // the fourth bit as a sign
    _mm256_storeu_ps(out, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at),
                                           _mm256_permutevar8x32_ps(high, at), upper));
  }
};
struct Nf4Words {
  static constexpr int kCount = 16;
  __m128i low, high;  // the numbers' bytes

  explicit Nf4Words(const void* from) {
    const auto* p = static_cast<const __m128i*>(from);
    const __m128i first = _mm_loadu_si128(p), second = _mm_loadu_si128(p + 1);
    const __m128i byte = _mm_set1_epi16(0xff);
    low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  }
  void put(const uint8_t* codes, void* out) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i at = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), nibble),
                                         _mm_and_si128(bytes, nibble));
    const __m128i lows = _mm_shuffle_epi8(low, at), highs = _mm_shuffle_epi8(high, at);
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm_unpacklo_epi8(lows, highs));
    _mm_storeu_si128(static_cast<__m128i*>(out) + 1, _mm_unpackhi_epi8(lows, highs));
  }
};

// As halves, whose exponent has a bit more.
inline F e4m3(const uint8_t* p) {
  const __m128i code = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(code, 7), _mm_set1_epi16(-0x4080)));
}
inline bool any_nan(const uint8_t* p) {
  const __m256i sign = _mm256_set1_epi8(-128), ones = _mm256_set1_epi8(-1);
  const auto nan = [&](const uint8_t* q) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_or_si256(codes, sign), ones));
  };
  return (nan(p) | nan(p + 32)) != 0;
}
inline void put(F v, Float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
}

}  // namespace
}  // namespace fusedpeft::cpu

#include "adapter_decode.h"
#include "adapter_train.h"
#include "decode.h"
#include "dropout.h"
#include "elementwise.h"
#include "multi_lora.h"
#include "prefix_decode.h"
#include "prefix_train.h"
#include "quantised.h"

namespace fusedpeft::cpu::avx2 {

void adapters(const Adapters& a) { adapters_any(a); }
void adapter_train(const AdapterTrain& a) { adapter_train_any(a); }
void decode(const Decode& d) { decode_any(d); }
void decode_quantised(const Decode& d, const Quantised& w) { decode_quantised_any(d, w); }
void dequantise(const Dequantise& d) { dequantise_any(d); }
void dropout(const Dropout& d) { dropout_any(d); }
void gated(const Gated& a) { gated_any(a); }
void rms_norm(const RmsNorm& a) { rms_norm_any(a); }
void rotary(const Rotary& a) { rotary_any(a); }
void softmax(const Softmax& a) { softmax_any(a); }
void prefix_decode(const PrefixDecode& d) { prefix_decode_any(d); }
void prefix_train(const PrefixTrain& a) { prefix_train_any(a); }
void multi_lora(const MultiLora& d) { multi_any(d); }

}  // namespace fusedpeft::cpu::avx2

#endif
