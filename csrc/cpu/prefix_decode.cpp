// The plan of a prefix_decode: which requests share a prefix, and which chunks of keys there are.
#include <algorithm>
#include <numeric>
#include <vector>

#include "checks.h"
#include "isa.h"

namespace fusedpeft::cpu {
namespace {

constexpr int64_t kChunk = 512;  // keys of an item: more items for the threads, more records to merge
constexpr int64_t kQueries = 64;  // of an item, at most, where a request has less: they stay in the L2

}  // namespace

void prefix_decode(const void* q, Keys k, Keys v, Keys pk, Keys pv, const int32_t* slots,
                   const int32_t* prefix_length, const int32_t* lengths, const int32_t* table,
                   void* out, float* lse, int64_t b, int64_t h, int64_t hkv, int64_t t, int64_t s,
                   int64_t d, int64_t slot_count, int64_t max_prefix, int64_t table_stride,
                   int64_t block, int64_t block_count, double scale, int64_t window, int dtype) {
  check(dtype >= kFloat32 && dtype <= kFloat16, "dtype: expected 0, 1 or 2, got ", dtype);
  check(b >= 0 && t >= 0 && s >= 0, "b, t, s: expected >= 0, got ", std::min({b, t, s}));
  check(d >= 1, "d: expected >= 1, got ", d);
  check(hkv >= 1 && h >= 0 && h % hkv == 0, "hkv: expected a divisor of h = ", h, ", got ", hkv);
  check(!table || block >= 1, "block: expected >= 1, got ", block);
  const int64_t rows = h / hkv * t;
  if (b == 0 || rows == 0) return;

  std::vector<int64_t> order(b), length(b), first(b + 1);
  std::vector<PrefixItem> items;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return slots[i] < slots[j]; });
  const auto prefix = [&](int64_t i) -> int64_t {  // its length; the messages are check_slots'
    const int64_t slot = slots[i], keys = slot >= 0 && slot < slot_count ? prefix_length[slot] : 0;
    check(slot >= -1 && slot < slot_count, "slots: expected -1 (no adapter) or 0..", slot_count - 1,
          ", got ", slot);
    check(keys >= 0, "slots: slot ", slot, " holds no adapter; load one into it first");
    check(keys <= max_prefix, "prefix.length: expected at most ", max_prefix, ", got ", keys);
    return keys;
  };

  const int64_t together = std::max<int64_t>(1, kQueries / rows);
  int64_t most = rows, work = 0;
  for (int64_t at = 0, next; at < b; at = next) {  // requests that share a prefix, some at a time
    for (next = at + 1; next < b && next - at < together && slots[order[next]] == slots[order[at]];)
      ++next;
    const int64_t keys = prefix(order[at]);
    for (int64_t begin = 0; begin < keys; begin += kChunk) {
      items.push_back({slots[order[at]], &order[at], next - at, begin,
                       std::min(begin + kChunk, keys), begin / kChunk});
      most = std::max(most, (next - at) * rows);
    }
    work += keys * (next - at);
  }
  std::vector<int64_t> self(b);
  for (int64_t i = 0; i < b; ++i) {
    self[i] = i;
    length[i] = lengths ? lengths[i] : s;
    check(length[i] >= 0 && length[i] <= s, "lengths: expected 0..", s, ", got ", length[i]);
    int64_t part = (prefix(i) + kChunk - 1) / kChunk;
    // Keys before those that the first query sees through its window are no one's.
    const int64_t begin = window > 0 ? std::max<int64_t>(0, length[i] - t + 1 - window) : 0;
    for (int64_t at = begin; at < length[i]; at += kChunk)
      items.push_back({-1, &self[i], 1, at, std::min(at + kChunk, length[i]), part++});
    for (int64_t at = begin / std::max<int64_t>(1, block); table && at * block < length[i]; ++at) {
      const int64_t named = table[i * table_stride + at];
      check(named >= 0 && named < block_count, "block_table: expected blocks 0..", block_count - 1,
            ", got ", named);
    }
    first[i + 1] = first[i] + part;
    work += length[i] - begin;
  }
  run({q, k, v, pk, pv, table, table_stride, block, out, lse, b, hkv, rows, t, d,
       static_cast<float>(scale), window, dtype, items.data(), static_cast<int64_t>(items.size()),
       length.data(), first.data(), most, work * hkv * rows * d});
}

}  // namespace fusedpeft::cpu
