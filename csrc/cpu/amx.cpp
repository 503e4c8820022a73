// bf16 for AMX: decode as in avx512_bf16.cpp, but W in tiles, and an adapter's training in them.
#if defined(__x86_64__)
#if defined(__linux__) && __has_include(<amxtileintrin.h>)  // else the assembler may not know tiles
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "pairs.h"

namespace fusedpeft::cpu {
namespace {

// In assembly: GCC's intrinsics take a tile's number only where it is spelt out.
FUSEDPEFT_INLINE void tiles_begin(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
FUSEDPEFT_INLINE void tiles_end() { asm volatile("tilerelease"); }

typedef uint16_t Half __attribute__((vector_size(2 * kWidth)));
FUSEDPEFT_INLINE U words(Half v) { return (U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
FUSEDPEFT_INLINE Half narrow(F v) { return (Half)_mm512_cvtneps_pbh(v); }
FUSEDPEFT_INLINE U narrow(F low, F high) { return (U)_mm512_cvtne2ps_pbh(high, low); }

template <int t>
FUSEDPEFT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
FUSEDPEFT_INLINE void tile_load(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(t) : "memory");
}
template <int t>
FUSEDPEFT_INLINE void tile_store(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(t) : "memory");
}
template <int c, int w, int x>
FUSEDPEFT_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(w), "i"(x));
}

}  // namespace
}  // namespace fusedpeft::cpu

#include "adapter_train_tiles.h"
#include "quantised_tiles.h"

namespace fusedpeft::cpu::amx {

// Linux keeps the tiles from a process that has not asked for them.
bool here() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
}

void adapter_train(const AdapterTrain& a) { TileTrain(a).run(); }
void decode(const Decode& d) { decode_in_tiles<Pairs>(d); }
void decode_quantised(const Decode& d, const Quantised& w) { decode_quantised_in_tiles<Pairs>(d, w); }
void multi_lora(const MultiLora& d) { run_multi(TileCall<Pairs>(d)); }

}  // namespace fusedpeft::cpu::amx

#else
#include "isa.h"

namespace fusedpeft::cpu::amx {

bool here() { return false; }
void adapter_train(const AdapterTrain& a) { avx512::adapter_train(a); }
void decode(const Decode& d) { avx512_bf16::decode(d); }
void decode_quantised(const Decode& d, const Quantised& w) { avx512::decode_quantised(d, w); }
void multi_lora(const MultiLora& d) { avx512_bf16::multi_lora(d); }

}  // namespace fusedpeft::cpu::amx

#endif
#endif
