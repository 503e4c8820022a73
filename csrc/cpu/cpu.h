// The CPU half of fusedpeft._C: plain pointers and sizes, no Python, no torch.
//
// Matrices are row-major with unit inner stride; s* is the distance between rows, in elements.
// Threads are those of OpenMP's pool (omp_get_max_threads: what torch.set_num_threads sets).
#pragma once

#include <cstdint>

namespace fusedpeft::cpu {

// Codes as in pyext/ops/native.py.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// y[m,n] = x[m,k] w[n,k]^T + bias[n] + scale * (x a[r,k]^T) b[n,r]^T, accumulated in fp32.
// x, w, bias (null: none) and y are of `dtype`; a and b of `adapter_dtype`, which is `dtype` or
// fp32. Any m, k, n >= 0 and r >= 1, made for m <= 16. Throws std::invalid_argument for other codes,
// or sizes, or FUSEDPEFT_CPU (below).
void lora_decode(const void* x, const void* w, const void* a, const void* b, const void* bias,
                 void* y, int64_t m, int64_t k, int64_t n, int64_t r, int64_t sx, int64_t sw,
                 int64_t sa, int64_t sb, int64_t sy, double scale, int dtype, int adapter_dtype);

// Rows of W [n, k] in 4 or 8 bits, as pyext/ops/quantised.py lays them out.
struct Quantised {
  const uint8_t* codes;
  const void* scale;  // NF4: absmax, of fp32, or where there is a book of uint8; FP8: fp32
  const float *book, *absmax2, *offset;  // null: absmax is not quantised
  int64_t n, k, block;                   // block 0: FP8
  bool by_row;                           // FP8: whether each row has its scale
};

// out[rows, cols] = W[row.., col..] in fp32, rounded to dtype. col is even. Throws
// std::invalid_argument for what lies outside of W, or other codes.
void dequantise(const Quantised& w, void* out, int64_t row, int64_t rows, int64_t col, int64_t cols,
                int64_t so, int dtype);

// As lora_decode over such a W; a number of W is what it is in fp32.
void lora_decode_quantised(const void* x, const Quantised& w, const void* a, const void* b,
                           const void* bias, void* y, int64_t m, int64_t r, int64_t sx, int64_t sa,
                           int64_t sb, int64_t sy, double scale, int dtype, int adapter_dtype);

enum Norm : int { kNoNorm = 0, kLayerNorm = 1, kRmsNorm = 2 };  // codes as in multi_adapter.py
enum Activation : int { kRelu, kGelu, kGeluTanh, kSilu, kTanh, kLeakyRelu };

// y[m,d] = residual + scale[s] * (act(norm(x) D^T + c) U^T + e) with s = slots[m]; residual where
// that is -1, or size[s] 0. The adapters of one place: see AdapterSlots in pyext/ops/slots.py.
struct Adapters {
  const void *x, *residual;  // of dtype, as y; residual null: 0
  void* y;
  const int32_t *slots, *size;  // slots null: all are 0
  const float* scale;
  // Of adapter_dtype, which is dtype or fp32; null where there are none, but for down and up.
  const void *down, *down_bias, *up, *up_bias, *norm_weight, *norm_bias;
  int64_t count, m, d;         // of slots, of tokens
  int64_t sx, sr, sy, sd, su;  // between rows of x, residual, y, D, U; su 0: of size rounded up to 8
  int64_t down_slot, down_bias_slot, up_slot, up_bias_slot;  // between slots
  int64_t norm_weight_slot, norm_bias_slot;
  float eps;
  int norm, activation, dtype, adapter_dtype;
  int64_t max_size;  // that a slot has room for
};

// Throws std::invalid_argument for other codes, sizes or slots, before anything is written.
void adapter_decode(Adapters a);

// One adapter for many tokens, y[m,d] as above; p[m,e] is x D^T + c, kept for the gradients, and
// stats[m,2] are the norm's mean and 1 / deviation. With dy the gradients instead, where they are not
// null: dx of the adapter's path, with add_dy dy in it, and of each weight as it is laid out.
// Everything is contiguous; x, residual, y, dy and dx are of dtype, weights, p and their gradients of
// adapter_dtype.
struct AdapterTrain {
  const void *x, *residual;  // residual null: none
  const void *down, *down_bias, *up, *up_bias, *norm_weight, *norm_bias;
  void *y, *p;
  float* stats;
  int64_t m, d, e;
  float scale, eps;
  int norm, activation, dtype, adapter_dtype;
  // Backward
  const void* dy;  // null: forward
  void *dx, *ddown, *ddown_bias, *dup, *dup_bias, *dnorm_weight, *dnorm_bias;
  float* work;  // [2, m rounded up to 32, e rounded up to 16] and 16 more
  bool add_dy;
};

// Throws std::invalid_argument for other codes or sizes, before anything is written.
void adapter_train(const AdapterTrain& a);

// Each row of out[m,d] = x / sqrt(mean(x^2) + eps) * (weight + offset), or with dy the gradient of x.
struct RmsNorm {
  const void *x, *weight, *dy;  // dy null: forward; everything of dtype and contiguous
  void* out;
  int64_t m, d;
  float eps, offset;
  int dtype;
};
// Throws std::invalid_argument for other codes or sizes, before anything is written.
void rms_norm(const RmsNorm& a);

// out[rows, width] = act(gate) * up, or with dy the gradients: of gate in out, which may be dy, of up
// in dup. Rows of gate and of up lie gate_row and up_row numbers apart, those of the others one behind
// the other. Everything is of dtype; the activation is kGelu, kGeluTanh or kSilu.
struct Gated {
  const void *gate, *up, *dy;
  void *out, *dup;
  int64_t rows, width, gate_row, up_row;
  int activation, dtype;
};
// Throws as rms_norm does.
void gated(const Gated& a);

// Rotary positions of out[b,h,t,d]: with the halves x1, x2 of a token's d numbers
//   out1 = x1 cos1 - x2 sin1, out2 = x2 cos2 + x1 sin2, or backward the gradient of x from that of out.
// cos and sin are [b,t,d], d of a token lying together as in x and out; *_b, *_h, *_t are the
// distances between what b, h and t number. Everything is of dtype.
struct Rotary {
  const void *x, *cos, *sin;
  void* out;
  int64_t b, h, t, d;
  int64_t x_b, x_h, x_t, cos_b, cos_t, sin_b, sin_t, out_b, out_h, out_t;
  bool backward;
  int dtype;
};
// Throws as rms_norm does, and for odd d.
void rotary(const Rotary& a);

// lse[rows] = logsumexp of z's rows, [rows, cols] of fp32 and contiguous; with `write` z becomes its
// softmax. Throws as rms_norm does.
void softmax(float* z, float* lse, int64_t rows, int64_t cols, bool write);

// y[m,n] = x[m,k] w[n,k]^T + bias[n], and of each row its own adapter's scale * B (A x): that of
// slots[m] (-1: none), part by part of n. The adapters lie as LoRASlots says (pyext/ops/slots.py).
struct LoraSlots {
  const void *a, *b;    // of adapter_dtype
  const int32_t* rank;  // [count, parts]; -1: the slot is free
  const float* scale;   // [count, parts]
  const int64_t* sizes;  // of the parts, n in all
  int64_t count, parts, max_rank;
  int64_t a_slot, a_row, b_slot;  // elements from one to the next
};
// As lora_decode; any m, made for m <= 64. Throws std::invalid_argument for other codes or sizes, a
// slot that is not there or free, or a rank beyond max_rank, before anything is written.
void multi_lora(const void* x, const void* w, const void* bias, void* y, const int32_t* slots,
                const LoraSlots& pool, int64_t m, int64_t k, int64_t n, int64_t sx, int64_t sw,
                int64_t sy, int dtype, int adapter_dtype);

// y = x W^T + bias: as multi_lora for m <= 64 tokens of which none names a slot.
void linear(const void* x, const void* w, const void* bias, void* y, int64_t m, int64_t k, int64_t n,
            int64_t sx, int64_t sw, int64_t sy, int dtype);

// out[rows,cols] = x * keep(row, col) / (1 - p); the mask is specified in pyext/ops/dropout.py.
void dropout(const void* x, void* out, int64_t rows, int64_t cols, int64_t sx, int64_t so, double p,
             int64_t seed, int dtype);

// Keys or values: `outer` elements from one request (block, slot) to the next, then head, then token.
struct Keys {
  const void* data;
  int64_t outer, head, token;
};

// Attention of q[b,h,t,d] (contiguous) over the prefix in slots[i], whole, and then request i's own
// keys, causal with the last query at the last of them; out as q and lse[b,h,t] contiguous.
// lengths[b]: keys of each request (null: s). table[b,blocks] of int32 (null: k and v are dense, one
// `outer` a request): the block of `block` tokens in which keys lie. slots[b] (-1: no prefix) below
// `slot_count`, with prefix_length[slots] keys. window: keys that a query sees of the request's own,
// 0: all. Throws std::invalid_argument for what would be read out of bounds.
void prefix_decode(const void* q, Keys k, Keys v, Keys pk, Keys pv, const int32_t* slots,
                   const int32_t* prefix_length, const int32_t* lengths, const int32_t* table,
                   void* out, float* lse, int64_t b, int64_t h, int64_t hkv, int64_t t, int64_t s,
                   int64_t d, int64_t slot_count, int64_t max_prefix, int64_t table_stride,
                   int64_t block, int64_t block_count, double scale, int64_t window, int dtype);

// Attention of q[b,h,t,d] over the prefix in row ids[b] of pk and pv (-1: none), whole, and the keys
// k, v[b,hkv,s,d] of the same row, the last query being at the last of them. Everything but lse,
// mask, dpk and dpv is of dtype, d of a token lying together.
struct PrefixTrain {
  Keys q, k, v, pk, pv, out;
  const int64_t* ids;
  const float* mask;  // added to the scores of keys; null: none
  int64_t mask_b, mask_h, mask_t;
  float* lse;  // [b,h,t]
  int64_t b, h, hkv, t, s, p, d;
  int64_t window;  // 0: none
  bool causal;
  float scale;
  int dtype;
  // Backward, where dout has data. dq, dk, dv: all or none.
  Keys dout, dq, dk, dv;
  const float* dlse;  // [b,h,t]; null: zeros
  float *dpk, *dpv;   // [*,hkv,p,d], added to; both or none
  float* work;        // prefix_train_floats for each of `threads`
  int64_t threads;
};
int64_t prefix_train_floats(int64_t p, int64_t s, int64_t d, bool backward);
// Throws std::invalid_argument for other codes or sizes, before anything is written.
void prefix_train(const PrefixTrain& a);

// What runs here: "amx", "avx512_bf16", "avx512", "avx2" or "portable", the best of the chip. The
// environment variable FUSEDPEFT_CPU, read once, forces one; std::invalid_argument where the chip
// lacks it.
const char* cpu_capability();

}  // namespace fusedpeft::cpu
