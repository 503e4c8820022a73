// The kernels at AVX-512's width and register count on any chip, in place of portable.cpp: what
// groups of 6 tokens, 8 rows and blocks of 32 do, the bf16 pairs of avx512_bf16.cpp and the tiles of
// amx.cpp, with their instructions spelt out.
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

#include "cpu/codes.h"
#include "cpu/adapter_decode.h"
#include "cpu/adapter_train.h"
#include "cpu/decode.h"
#include "cpu/dropout.h"
#include "cpu/elementwise.h"
#include "cpu/multi_lora.h"
#include "cpu/prefix_decode.h"
#include "cpu/prefix_train.h"
#include "cpu/quantised.h"

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
  static void narrow(const float* from, BFloat16* to) {
    for (int i = 0; i < kBlock; ++i) from_float(from[i], to + i);
  }
  static void pack(const BFloat16* from, BFloat16* to) {
    __builtin_memcpy(to, from, kBlock * sizeof *to);
  }
};

typedef uint16_t Half __attribute__((vector_size(2 * kWidth)));
U words(Half v) { return __builtin_convertvector(v, U); }
Half narrow(F v) {
  Half to;
  for (int i = 0; i < kWidth; ++i) {
    BFloat16 one;
    from_float(v[i], &one);
    to[i] = one.bits;
  }
  return to;
}
U narrow(F low, F high) {
  const Half both[] = {narrow(low), narrow(high)};
  U to;
  __builtin_memcpy(&to, both, sizeof to);
  return to;
}

struct Tile {
  unsigned char rows[16][64];
};
thread_local TileShapes shapes;
thread_local Tile tiles[8];

void tiles_begin(const TileShapes& wanted) {
  shapes = wanted;
  __builtin_memset(tiles, 0, sizeof tiles);
}
void tiles_end() { tiles_begin({}); }

template <int t>
void tile_zero() {
  __builtin_memset(&tiles[t], 0, sizeof(Tile));
}
template <int t>
void tile_load(const void* from, int64_t bytes) {
  for (int i = 0; i < shapes.rows[t]; ++i)
    __builtin_memcpy(tiles[t].rows[i], static_cast<const char*>(from) + i * bytes, shapes.bytes[t]);
}
template <int t>
void tile_store(void* to, int64_t bytes) {
  for (int i = 0; i < shapes.rows[t]; ++i)
    __builtin_memcpy(static_cast<char*>(to) + i * bytes, tiles[t].rows[i], shapes.bytes[t]);
}
// Traps where the chip would: shapes that do not fit each other.
template <int c, int w, int x>
void tile_dot() {
  const int rows = shapes.rows[c], pairs = shapes.rows[x], columns = shapes.bytes[c] / 4;
  if (rows == 0 || columns == 0 || shapes.rows[w] != rows || shapes.bytes[w] != 4 * pairs ||
      shapes.bytes[x] != 4 * columns)
    __builtin_trap();
  const auto number = [](const Tile& t, int i, int j) {
    BFloat16 v;
    __builtin_memcpy(&v, t.rows[i] + 2 * j, sizeof v);
    return to_float(v);
  };
  for (int i = 0; i < rows; ++i)
    for (int m = 0; m < columns; ++m) {
      float sum;
      __builtin_memcpy(&sum, tiles[c].rows[i] + 4 * m, sizeof sum);
      for (int j = 0; j < 2 * pairs; ++j)
        sum += number(tiles[w], i, j) * number(tiles[x], j / 2, 2 * m + j % 2);
      __builtin_memcpy(tiles[c].rows[i] + 4 * m, &sum, sizeof sum);
    }
}

}  // namespace
}  // namespace fusedpeft::cpu

#include "cpu/adapter_train_tiles.h"
#include "cpu/quantised_tiles.h"

namespace fusedpeft::cpu {

namespace portable {

void adapters(const Adapters& a) {
  if (a.dtype != kBFloat16 || a.adapter_dtype != kBFloat16 || a.norm) return adapters_any(a);
  return AdapterCall<BFloat16, BFloat16, Pairs>(a).run();
}
void adapter_train(const AdapterTrain& a) {
  return fit_tiles(a) ? TileTrain(a).run() : adapter_train_any(a);
}
void decode(const Decode& d) {
  if (d.dtype != kBFloat16) return decode_any(d);
  if (fit_tiles(d)) return decode_in_tiles<Pairs>(d);
  if (d.adapter_dtype == kBFloat16) return decode_as<BFloat16, BFloat16, Pairs, Pairs>(d);
  return decode_as<BFloat16, float, Pairs, Wide<float>>(d);
}
void decode_quantised(const Decode& d, const Quantised& w) {
  return fit_tiles(d) ? decode_quantised_in_tiles<Pairs>(d, w) : decode_quantised_any(d, w);
}
void dequantise(const Dequantise& d) { dequantise_any(d); }
void dropout(const Dropout& d) { dropout_any(d); }
void gated(const Gated& a) { gated_any(a); }
void rms_norm(const RmsNorm& a) { rms_norm_any(a); }
void rotary(const Rotary& a) { rotary_any(a); }
void softmax(const Softmax& a) { softmax_any(a); }
void prefix_decode(const PrefixDecode& d) { prefix_decode_any(d); }
void prefix_train(const PrefixTrain& a) { prefix_train_any(a); }
void multi_lora(const MultiLora& d) {
  if (d.dtype != kBFloat16) return multi_any(d);
  if (fit_tiles(d)) return run_multi(TileCall<Pairs>(d));
  if (d.adapter_dtype == kBFloat16) return run_multi(MultiCall<BFloat16, BFloat16, Pairs, Pairs>(d));
  return run_multi(MultiCall<BFloat16, float, Pairs, Wide<float>>(d));
}

}  // namespace portable
}  // namespace fusedpeft::cpu
