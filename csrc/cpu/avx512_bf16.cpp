// Decode in bf16 for AVX-512 with BF16: as avx512.cpp, pairs multiplied as they lie in memory.
#if defined(__x86_64__)
#include <omp.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "pairs.h"
#include "adapter_decode.h"
#include "decode.h"
#include "multi_lora.h"

namespace fusedpeft::cpu::avx512_bf16 {

void adapters(const Adapters& a) { AdapterCall<BFloat16, BFloat16, Pairs>(a).run(); }

void decode(const Decode& d) {
  if (d.adapter_dtype == kBFloat16) return decode_as<BFloat16, BFloat16, Pairs, Pairs>(d);
  return decode_as<BFloat16, float, Pairs, Wide<float>>(d);
}

void multi_lora(const MultiLora& d) {
  if (d.adapter_dtype == kBFloat16) return run_multi(MultiCall<BFloat16, BFloat16, Pairs, Pairs>(d));
  return run_multi(MultiCall<BFloat16, float, Pairs, Wide<float>>(d));
}

}  // namespace fusedpeft::cpu::avx512_bf16

#endif
