// What dispatch.cpp and the files of the instruction sets share: calls, and their entry points.
#pragma once

#include "cpu.h"

namespace fusedpeft::cpu {

struct Decode {
  const void *x, *w, *a, *b, *bias;
  void* y;
  int64_t m, k, n, r;
  int64_t sx, sw, sa, sb, sy;
  float scale;
  int dtype, adapter_dtype;
};

struct Dequantise {
  Quantised w;
  void* out;
  int64_t row, rows, col, cols, so;
  int dtype;
};

// An adapter of rank > 0 beside the tokens of a batch that name its slot, of one part of N.
struct LoraPart {
  const void *a, *b;
  int64_t rank, first, rows;  // of W: the part is first..first + rows
  int64_t sb;                 // between rows of B; its columns from `rank` on are zeros
  int64_t s, stride;          // S in the call's scratch, the distance of its tokens; in floats
  float scale;
  int begin, end;  // tokens
  int column;      // of `begin` among the batch's tokens
};
struct Batch {
  int begin, end;                  // tokens
  int64_t first_part, last_part;
};
struct MultiLora {
  const void *x, *w, *bias;
  void* y;
  int64_t m, k, n;
  int64_t sx, sw, sy, sa;
  const int* order;  // rows of x and y by their slots: the tokens
  const LoraPart* parts;
  const Batch* batches;  // of at most 16 tokens
  int64_t part_count, batch_count, s_size;
  int dtype, adapter_dtype;
};

constexpr int64_t kRankStep = 8;  // pyext/ops/slots.py

// What multi_lora_tiles.h takes. The number of tokens does not count: bits are the same beside any.
// Static: see numbers.h on functions that several files share.
static inline bool fit_tiles(const MultiLora& d) {
  return d.dtype == kBFloat16 && d.adapter_dtype == kBFloat16 && d.k % 32 == 0;
}
static inline bool fit_tiles(const Decode& d) {
  return d.dtype == kBFloat16 && d.adapter_dtype == kBFloat16 && d.k % 32 == 0 &&
         d.r % kRankStep == 0;
}

// What adapter_train_tiles.h takes.
static inline bool fit_tiles(const AdapterTrain& a) {
  return a.dtype == kBFloat16 && a.adapter_dtype == kBFloat16;
}

struct Softmax {
  float *z, *lse;
  int64_t rows, cols;
  bool write;
};

struct TileShapes {  // of AMX's eight tiles, as the chip reads them
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Dropout {
  const void* x;
  void* out;
  int64_t rows, cols, sx, so;
  double p;
  uint64_t seed;
  int dtype;
};

constexpr int64_t kMaxTokens = 64;  // of one call

// Of a block in prefix_train.h: multiples of every kTileRows and kWidth.
constexpr int64_t kBlockQueries = 48, kBlockKeys = 48;
struct PrefixItem {  // queries of `count` requests against keys begin..end that all of them see
  int64_t slot;      // whose prefix; -1: the keys of members[0] itself
  const int64_t* members;
  int64_t count, begin, end;
  int64_t part;  // which of a member's parts this is
};

struct PrefixDecode {
  const void* q;
  Keys k, v, pk, pv;
  const int32_t* table;  // null: dense
  int64_t table_stride, block;
  void* out;
  float* lse;
  int64_t b, hkv, rows, t, d;  // rows: queries of a request and a head of k, H / HKV * t
  float scale;
  int64_t window;  // 0: none
  int dtype;
  // The plan, from prefix_decode.cpp.
  const PrefixItem* items;
  int64_t count;
  const int64_t *lengths, *first;  // [b]: keys; [b + 1]: parts of all requests before
  int64_t most;                    // queries of an item, at most
  int64_t work;                    // products with keys
};

namespace portable {
void adapters(const Adapters& a);
void adapter_train(const AdapterTrain& a);
void decode(const Decode& d);
void decode_quantised(const Decode& d, const Quantised& w);
void dequantise(const Dequantise& d);
void multi_lora(const MultiLora& d);
void dropout(const Dropout& d);
void gated(const Gated& a);
void prefix_decode(const PrefixDecode& d);
void prefix_train(const PrefixTrain& a);
void rms_norm(const RmsNorm& a);
void rotary(const Rotary& a);
void softmax(const Softmax& a);
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
void adapters(const Adapters& a);
void adapter_train(const AdapterTrain& a);
void decode(const Decode& d);
void decode_quantised(const Decode& d, const Quantised& w);
void dequantise(const Dequantise& d);
void multi_lora(const MultiLora& d);
void dropout(const Dropout& d);
void gated(const Gated& a);
void prefix_decode(const PrefixDecode& d);
void prefix_train(const PrefixTrain& a);
void rms_norm(const RmsNorm& a);
void rotary(const Rotary& a);
void softmax(const Softmax& a);
}  // namespace avx2
namespace avx512 {
void adapters(const Adapters& a);
void adapter_train(const AdapterTrain& a);
void decode(const Decode& d);
void decode_quantised(const Decode& d, const Quantised& w);
void dequantise(const Dequantise& d);
void multi_lora(const MultiLora& d);
void dropout(const Dropout& d);
void gated(const Gated& a);
void prefix_decode(const PrefixDecode& d);
void prefix_train(const PrefixTrain& a);
void rms_norm(const RmsNorm& a);
void rotary(const Rotary& a);
void softmax(const Softmax& a);
}  // namespace avx512
namespace avx512_bf16 {
void adapters(const Adapters& a);  // of bf16 and without a norm; the rest is avx512's
void decode(const Decode& d);  // in bf16; the rest is avx512's
void multi_lora(const MultiLora& d);
}  // namespace avx512_bf16
namespace amx {
bool here();  // asks the kernel for the tiles, once
void adapter_train(const AdapterTrain& a);
void decode(const Decode& d);
void decode_quantised(const Decode& d, const Quantised& w);
void multi_lora(const MultiLora& d);
}  // namespace amx
#endif

void run(const PrefixDecode& d);  // on the instruction set that runs here

// Memory of the calling thread that lives until its next call; 64-byte aligned.
void* scratch(int64_t bytes);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fusedpeft::cpu
