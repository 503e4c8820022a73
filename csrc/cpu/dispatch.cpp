// Which instruction set runs, and the calls of cpu.h that go by it.
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedpeft::cpu {
namespace {

struct Level {
  const char* name;
  bool here;
  void (*adapters)(const Adapters&);
  void (*decode)(const Decode&);
  void (*dropout)(const Dropout&);
  void (*prefix_decode)(const PrefixDecode&);
  void (*multi_lora)(const MultiLora&);
  void (*adapter_train)(const AdapterTrain&);
  void (*prefix_train)(const PrefixTrain&);
  void (*dequantise)(const Dequantise&);
  void (*decode_quantised)(const Decode&, const Quantised&);
  void (*rms_norm)(const RmsNorm&);
  void (*gated)(const Gated&);
  void (*rotary)(const Rotary&);
  void (*softmax)(const Softmax&);
};

#if defined(__x86_64__)
void in_bf16(const Decode& d) {
  return d.dtype == kBFloat16 ? avx512_bf16::decode(d) : avx512::decode(d);
}
void adapters_in_bf16(const Adapters& a) {
  const bool pairs = a.adapter_dtype == kBFloat16 && a.norm == kNoNorm;
  return pairs ? avx512_bf16::adapters(a) : avx512::adapters(a);
}
void multi_lora_in_bf16(const MultiLora& d) {
  return d.dtype == kBFloat16 ? avx512_bf16::multi_lora(d) : avx512::multi_lora(d);
}
void decode_in_tiles(const Decode& d) { return fit_tiles(d) ? amx::decode(d) : in_bf16(d); }
void multi_lora_in_tiles(const MultiLora& d) {
  return fit_tiles(d) ? amx::multi_lora(d) : multi_lora_in_bf16(d);
}
void adapter_train_in_tiles(const AdapterTrain& a) {
  return fit_tiles(a) ? amx::adapter_train(a) : avx512::adapter_train(a);
}
void decode_quantised_in_tiles(const Decode& d, const Quantised& w) {
  return fit_tiles(d) ? amx::decode_quantised(d, w) : avx512::decode_quantised(d, w);
}
#endif

// Best first.
const Level* levels(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool tiles = bf16 && amx::here();
  static const Level all[] = {
      {"amx", tiles, adapters_in_bf16, decode_in_tiles, avx512::dropout, avx512::prefix_decode,
       multi_lora_in_tiles, adapter_train_in_tiles, avx512::prefix_train, avx512::dequantise,
       decode_quantised_in_tiles, avx512::rms_norm, avx512::gated, avx512::rotary, avx512::softmax},
      {"avx512_bf16", bf16, adapters_in_bf16, in_bf16, avx512::dropout, avx512::prefix_decode,
       multi_lora_in_bf16, avx512::adapter_train, avx512::prefix_train, avx512::dequantise,
       avx512::decode_quantised, avx512::rms_norm, avx512::gated, avx512::rotary, avx512::softmax},
      {"avx512", avx512, avx512::adapters, avx512::decode, avx512::dropout, avx512::prefix_decode,
       avx512::multi_lora, avx512::adapter_train, avx512::prefix_train, avx512::dequantise,
       avx512::decode_quantised, avx512::rms_norm, avx512::gated, avx512::rotary, avx512::softmax},
      {"avx2", avx2, avx2::adapters, avx2::decode, avx2::dropout, avx2::prefix_decode,
       avx2::multi_lora, avx2::adapter_train, avx2::prefix_train, avx2::dequantise,
       avx2::decode_quantised, avx2::rms_norm, avx2::gated, avx2::rotary, avx2::softmax},
      {"portable", true, portable::adapters, portable::decode, portable::dropout,
       portable::prefix_decode, portable::multi_lora, portable::adapter_train,
       portable::prefix_train, portable::dequantise, portable::decode_quantised,
       portable::rms_norm, portable::gated, portable::rotary, portable::softmax}};
#else
  static const Level all[] = {{"portable", true, portable::adapters, portable::decode,
                               portable::dropout, portable::prefix_decode, portable::multi_lora,
                               portable::adapter_train, portable::prefix_train,
                               portable::dequantise, portable::decode_quantised,
                               portable::rms_norm, portable::gated, portable::rotary,
                               portable::softmax}};
#endif
  *count = sizeof all / sizeof *all;
  return all;
}

const Level& choose() {
  int count;
  const Level* all = levels(&count);
  const char* forced = std::getenv("FUSEDPEFT_CPU");
  std::string here;
  for (int i = 0; i < count; ++i) {
    if (!all[i].here) continue;
    if (!forced || !*forced || std::string(forced) == all[i].name) return all[i];
    here += std::string(here.empty() ? "" : ", ") + all[i].name;
  }
  throw std::invalid_argument("FUSEDPEFT_CPU: expected one of " + here + " (what this chip has), got " +
                              forced);
}

const Level& level() {
  static const Level& chosen = choose();  // one that throws is tried again by the next call
  return chosen;
}

void check(bool ok, const char* what, int64_t got) {
  if (!ok) throw std::invalid_argument(std::string(what) + ", got " + std::to_string(got));
}

// What Adapters and AdapterTrain have in common.
template <class A>
void check_adapter(const A& a) {
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected 0, 1 or 2", a.dtype);
  check(a.adapter_dtype == a.dtype || a.adapter_dtype == kFloat32,
        "adapter_dtype: expected dtype's or 0", a.adapter_dtype);
  check(a.norm >= kNoNorm && a.norm <= kRmsNorm, "norm: expected 0, 1 or 2", a.norm);
  check(a.activation >= kRelu && a.activation <= kLeakyRelu, "activation: expected 0..5",
        a.activation);
  check(a.m >= 0, "m: expected >= 0", a.m);
}

// As check_slots of pyext/ops/slots.py; size: [count, parts].
void check_slots(const int32_t* slots, int64_t m, const int32_t* size, int64_t count, int64_t parts) {
  for (int64_t i = 0; i < m; ++i)
    if (slots[i] < -1 || slots[i] >= count)
      throw std::invalid_argument("slots: expected -1 (no adapter) or 0.." +
                                  std::to_string(count - 1) + ", got " + std::to_string(slots[i]));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t part = 0; slots[i] >= 0 && part < parts; ++part)
      if (size[slots[i] * parts + part] < 0)
        throw std::invalid_argument("slots: slot " + std::to_string(slots[i]) +
                                    " holds no adapter; load one into it first");
}

}  // namespace

void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    memory.reset(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
    size = bytes;
  }
  return memory.get();
}

void run(const PrefixDecode& d) { level().prefix_decode(d); }

const char* cpu_capability() { return level().name; }

void lora_decode(const void* x, const void* w, const void* a, const void* b, const void* bias,
                 void* y, int64_t m, int64_t k, int64_t n, int64_t r, int64_t sx, int64_t sw,
                 int64_t sa, int64_t sb, int64_t sy, double scale, int dtype, int adapter_dtype) {
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected 0, 1 or 2", dtype);
  check(adapter_dtype == dtype || adapter_dtype == kFloat32,
        "adapter_dtype: expected dtype's or 0", adapter_dtype);
  check(m >= 0, "m: expected >= 0", m);
  check(k >= 0, "k: expected >= 0", k);
  check(n >= 0, "n: expected >= 0", n);
  check(r >= 1, "r: expected >= 1", r);
  const int64_t bytes = dtype == kFloat32 ? 4 : 2, most = 16;
  for (int64_t i = 0; i < m && n > 0; i += most) {
    level().decode({static_cast<const char*>(x) + i * sx * bytes, w, a, b, bias,
                    static_cast<char*>(y) + i * sy * bytes, m - i < most ? m - i : most, k, n, r, sx,
                    sw, sa, sb, sy, static_cast<float>(scale), dtype, adapter_dtype});
  }
}

// Sizes that nothing could be, of W and of the kernels.
void check_quantised(const Quantised& w) {
  check(w.n >= 0, "n: expected >= 0", w.n);
  check(w.k >= 0 && (w.block == 0 || w.k % 2 == 0), "k: expected >= 0, even in NF4", w.k);
  check(w.block == 0 || w.block >= 64, "block: expected 0 (FP8) or >= 64", w.block);
}

void dequantise(const Quantised& w, void* out, int64_t row, int64_t rows, int64_t col, int64_t cols,
                int64_t so, int dtype) {
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected 0, 1 or 2", dtype);
  check_quantised(w);
  check(row >= 0 && row <= w.n, "row: expected 0..n", row);
  check(rows >= 0 && rows <= w.n - row, "rows: expected 0..n - row", rows);
  check(col >= 0 && col <= w.k && col % 2 == 0, "col: expected 0..k, even", col);
  check(cols >= 0 && cols <= w.k - col, "cols: expected 0..k - col", cols);
  level().dequantise({w, out, row, rows, col, cols, so, dtype});
}

void lora_decode_quantised(const void* x, const Quantised& w, const void* a, const void* b,
                           const void* bias, void* y, int64_t m, int64_t r, int64_t sx, int64_t sa,
                           int64_t sb, int64_t sy, double scale, int dtype, int adapter_dtype) {
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected 0, 1 or 2", dtype);
  check(adapter_dtype == dtype || adapter_dtype == kFloat32,
        "adapter_dtype: expected dtype's or 0", adapter_dtype);
  check_quantised(w);
  check(m >= 0, "m: expected >= 0", m);
  check(r >= 1, "r: expected >= 1", r);
  const int64_t bytes = dtype == kFloat32 ? 4 : 2, most = 16;
  for (int64_t i = 0; i < m && w.n > 0; i += most) {
    level().decode_quantised(
        {static_cast<const char*>(x) + i * sx * bytes, nullptr, a, b, bias,
         static_cast<char*>(y) + i * sy * bytes, m - i < most ? m - i : most, w.k, w.n, r, sx, 0, sa,
         sb, sy, static_cast<float>(scale), dtype, adapter_dtype},
        w);
  }
}

void adapter_decode(Adapters a) {
  check_adapter(a);
  check(a.d >= 0, "d: expected >= 0", a.d);
  if (a.slots) check_slots(a.slots, a.m, a.size, a.count, 1);
  for (int64_t i = 0; a.slots && i < a.m; ++i)
    if (a.slots[i] >= 0)
      check(a.size[a.slots[i]] <= a.max_size, "size: expected <= max_size", a.size[a.slots[i]]);
  const int64_t bytes = a.dtype == kFloat32 ? 4 : 2;
  for (int64_t left = a.d > 0 ? a.m : 0; left > 0; left -= kMaxTokens) {
    a.m = left < kMaxTokens ? left : kMaxTokens;
    level().adapters(a);
    a.x = static_cast<const char*>(a.x) + a.m * a.sx * bytes;
    if (a.residual) a.residual = static_cast<const char*>(a.residual) + a.m * a.sr * bytes;
    a.y = static_cast<char*>(a.y) + a.m * a.sy * bytes;
    if (a.slots) a.slots += a.m;
  }
}

void adapter_train(const AdapterTrain& a) {
  check_adapter(a);
  check(a.m >= 1, "m: expected >= 1", a.m);
  check(a.d >= 1, "d: expected >= 1", a.d);
  check(a.e >= 1, "e: expected >= 1", a.e);
  level().adapter_train(a);
}

int64_t prefix_train_floats(int64_t p, int64_t s, int64_t d, bool backward) {
  constexpr int64_t widest = 16;  // floats of a vector, of any instruction set
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step * step; };
  const int64_t dp = up(d, widest), all = (up(p, kBlockKeys) + up(s, kBlockKeys)) * dp;
  const int64_t some = kBlockQueries * dp, square = kBlockQueries * kBlockKeys;
  return backward ? 6 * all + 5 * some + 2 * square : 2 * all + 2 * some + square;
}

void prefix_train(const PrefixTrain& a) {
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected 0, 1 or 2", a.dtype);
  check(a.b >= 1 && a.t >= 1 && a.s >= a.t, "b, t, s: expected >= 1, s >= t", a.t);
  check(a.hkv >= 1 && a.h >= a.hkv && a.h % a.hkv == 0, "h: expected a multiple of hkv", a.h);
  check(a.p >= 0, "p: expected >= 0", a.p);
  check(a.d >= 1, "d: expected >= 1", a.d);
  check(a.threads >= 1, "threads: expected >= 1", a.threads);
  level().prefix_train(a);
}

void rms_norm(const RmsNorm& a) {
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected 0, 1 or 2", a.dtype);
  check(a.m >= 0, "m: expected >= 0", a.m);
  check(a.d >= 1, "d: expected >= 1", a.d);
  level().rms_norm(a);
}

void gated(const Gated& a) {
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected 0, 1 or 2", a.dtype);
  check(a.activation == kGelu || a.activation == kGeluTanh || a.activation == kSilu,
        "activation: expected 1, 2 or 3", a.activation);
  check(a.rows >= 0 && a.width >= 0, "rows, width: expected >= 0", std::min(a.rows, a.width));
  if (a.width > 0) level().gated(a);
}

void rotary(const Rotary& a) {
  check(a.dtype >= kFloat32 && a.dtype <= kFloat16, "dtype: expected 0, 1 or 2", a.dtype);
  check(a.b >= 0 && a.h >= 0 && a.t >= 0, "b, h, t: expected >= 0", a.b);
  check(a.d >= 2 && a.d % 2 == 0, "d: expected >= 2, even", a.d);
  level().rotary(a);
}

void softmax(float* z, float* lse, int64_t rows, int64_t cols, bool write) {
  check(rows >= 0, "rows: expected >= 0", rows);
  check(cols >= 1, "cols: expected >= 1", cols);
  level().softmax({z, lse, rows, cols, write});
}

void multi_lora(const void* x, const void* w, const void* bias, void* y, const int32_t* slots,
                const LoraSlots& pool, int64_t m, int64_t k, int64_t n, int64_t sx, int64_t sw,
                int64_t sy, int dtype, int adapter_dtype) {
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected 0, 1 or 2", dtype);
  check(adapter_dtype == dtype || adapter_dtype == kFloat32,
        "adapter_dtype: expected dtype's or 0", adapter_dtype);
  check(m >= 0, "m: expected >= 0", m);
  check(k >= 0, "k: expected >= 0", k);
  check(n >= 0, "n: expected >= 0", n);
  check(pool.max_rank >= 1 && pool.max_rank % kRankStep == 0, "max_rank: expected a multiple of 8",
        pool.max_rank);
  const int64_t rows = std::accumulate(pool.sizes, pool.sizes + pool.parts, int64_t{0});
  check(rows == n, "sizes: expected a sum of n", rows);
  check_slots(slots, m, pool.rank, pool.count, pool.parts);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t part = 0; slots[i] >= 0 && part < pool.parts; ++part) {
      const int64_t rank = pool.rank[slots[i] * pool.parts + part];
      check(rank <= pool.max_rank, "rank: expected <= max_rank", rank);
    }
  const int64_t bytes = dtype == kFloat32 ? 4 : 2, adapter_bytes = adapter_dtype == kFloat32 ? 4 : 2;
  constexpr int64_t most = kMaxTokens, at_once = 16;
  int order[most];
  Batch batches[most / at_once];
  std::vector<LoraPart> parts;
  for (int64_t done = 0; done < m && n > 0; done += most) {
    const int64_t tokens = std::min(m - done, most), count = (tokens + at_once - 1) / at_once;
    const int32_t* slot = slots + done;
    std::iota(order, order + tokens, 0);
    std::sort(order, order + tokens,
              [&](int i, int j) { return slot[i] < slot[j] || (slot[i] == slot[j] && i < j); });
    parts.clear();
    int64_t floats = 0;
    for (int64_t i = 0; i < count; ++i) {
      Batch& batch = batches[i];
      batch = {static_cast<int>(tokens * i / count), static_cast<int>(tokens * (i + 1) / count),
               static_cast<int64_t>(parts.size()), 0};
      for (int begin = batch.begin, end; begin < batch.end; begin = end) {
        const int64_t s = slot[order[begin]];
        for (end = begin + 1; end < batch.end && slot[order[end]] == s;) ++end;
        int64_t first = 0;
        for (int64_t part = 0; s >= 0 && part < pool.parts; first += pool.sizes[part++]) {
          const int64_t rank = pool.rank[s * pool.parts + part];
          if (rank == 0) continue;
          const int64_t sb = (rank + kRankStep - 1) / kRankStep * kRankStep;
          const int64_t stride = (rank + 15) / 16 * 16;  // whole vectors of every width
          parts.push_back(
              {static_cast<const char*>(pool.a) +
                   (s * pool.a_slot + part * pool.max_rank * pool.a_row) * adapter_bytes,
               static_cast<const char*>(pool.b) +
                   (s * pool.b_slot + first * pool.max_rank) * adapter_bytes,
               rank, first, pool.sizes[part], sb, floats, stride,
               pool.scale[s * pool.parts + part], begin, end, begin - batch.begin});
          floats += (end - begin) * stride;
        }
      }
      batch.last_part = static_cast<int64_t>(parts.size());
    }
    level().multi_lora({static_cast<const char*>(x) + done * sx * bytes, w, bias,
                        static_cast<char*>(y) + done * sy * bytes, tokens, k, n, sx, sw, sy,
                        pool.a_row, order, parts.data(), batches,
                        static_cast<int64_t>(parts.size()), count, floats, dtype, adapter_dtype});
  }
}

void linear(const void* x, const void* w, const void* bias, void* y, int64_t m, int64_t k, int64_t n,
            int64_t sx, int64_t sw, int64_t sy, int dtype) {
  static const std::vector<int32_t> none(kMaxTokens, -1);
  check(m <= kMaxTokens, "m: expected <= 64", m);
  const LoraSlots pool = {nullptr, nullptr, nullptr, nullptr, &n, 0, 1, kRankStep, 0, 0, 0};
  multi_lora(x, w, bias, y, none.data(), pool, m, k, n, sx, sw, sy, dtype, dtype);
}

void dropout(const void* x, void* out, int64_t rows, int64_t cols, int64_t sx, int64_t so, double p,
             int64_t seed, int dtype) {
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected 0, 1 or 2", dtype);
  check(rows >= 0, "rows: expected >= 0", rows);
  check(cols >= 0, "cols: expected >= 0", cols);
  if (!(p >= 0.0 && p < 1.0))
    throw std::invalid_argument("p: expected 0 <= p < 1, got " + std::to_string(p));
  level().dropout({x, out, rows, cols, sx, so, p, static_cast<uint64_t>(seed), dtype});
}

}  // namespace fusedpeft::cpu
