// The kernels for AVX-512.
#if defined(__x86_64__)
#include <omp.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "avx512.h"
#include "adapter_decode.h"
#include "adapter_train.h"
#include "decode.h"
#include "dropout.h"
#include "elementwise.h"
#include "multi_lora.h"
#include "prefix_decode.h"
#include "prefix_train.h"
#include "quantised.h"

namespace fusedpeft::cpu::avx512 {

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

}  // namespace fusedpeft::cpu::avx512

#endif
