// The kernels for any chip: vectors of 4 floats that the compiler maps to what there is.
#include <omp.h>

#include "isa.h"

namespace fusedpeft::cpu {
namespace {

constexpr int kWidth = 4, kRegisters = 16;
constexpr bool kHalvesInOrder = false;
typedef float F __attribute__((vector_size(16)));

inline F fma(F a, F b, F c) { return a * b + c; }

// The even elements, then the odd ones; as to_float(Float16), four at a time.
template <int part>
inline F half(const Float16* p) {
  typedef uint32_t U4 __attribute__((vector_size(16)));
  U4 pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  const U4 bits = part == 0 ? pairs << 16 : pairs, rest = (bits >> 3) & 0x0fffe000u;
  const U4 finite = reinterpret_cast<U4>(reinterpret_cast<F>(rest) * 0x1p112f);
  const U4 special = reinterpret_cast<U4>(rest >= 0x0f800000u);
  return reinterpret_cast<F>((bits & 0x80000000u) | (special & (rest | 0x7f800000u)) |
                             (~special & finite));
}

}  // namespace
}  // namespace fusedpeft::cpu

#include "codes.h"
#include "adapter_decode.h"
#include "adapter_train.h"
#include "decode.h"
#include "dropout.h"
#include "elementwise.h"
#include "multi_lora.h"
#include "prefix_decode.h"
#include "prefix_train.h"
#include "quantised.h"

namespace fusedpeft::cpu::portable {

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

}  // namespace fusedpeft::cpu::portable
