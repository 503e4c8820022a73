// multi_lora of csrc/cpu against sums in double: ragged shapes, ranks and stacked parts, and slots
// of which only what the adapter owns is not NaN.
#include <exception>
#include <string>
#include <vector>

#include "cpu_matrix.h"

using namespace fusedpeft::cpu;

namespace {

constexpr int64_t kMaxRank = 40;

struct Pool {
  std::vector<int64_t> sizes;
  int64_t count, parts, n = 0;
  std::vector<int32_t> rank;
  std::vector<float> scale;
  Matrix a, b;

  // Ranks of slot s, part i: some of 0..kMaxRank; the last slot is free.
  Pool(int64_t count, const std::vector<int64_t>& sizes, int64_t k, int dtype, int64_t gap,
       std::mt19937& random)
      : sizes(sizes), count(count), parts(static_cast<int64_t>(sizes.size())),
        n(sum()), a(count * parts * kMaxRank, k, gap, dtype), b(count, n * kMaxRank, gap, dtype) {
    a.fill(random), b.fill(random);
    for (int64_t s = 0; s < count; ++s) {
      int64_t first = 0;
      for (int64_t i = 0; i < parts; first += sizes[static_cast<size_t>(i++)]) {
        const int64_t r = s + 1 == count ? -1 : (s * 7 + i * 5 + 1) % (kMaxRank + 1);
        rank.push_back(static_cast<int32_t>(r));
        scale.push_back(0.25f * static_cast<float>(i + 1));
        for (int64_t j = r < 0 ? 0 : r; j < kMaxRank; ++j) a.poison(row(s, i) + j, 0, k);
        const int64_t begin = first * kMaxRank, own = sizes[static_cast<size_t>(i)], l = stride(r);
        b.poison(s, begin + own * l, begin + own * kMaxRank);
        for (int64_t j = 0; j < own; ++j)  // columns beyond the rank are zeros
          for (int64_t q = r; q < l; ++q)
            std::memset(b.at(s, begin + j * l + q), 0, static_cast<size_t>(b.size()));
      }
    }
  }
  int64_t sum() const {
    int64_t all = 0;
    for (int64_t size : sizes) all += size;
    return all;
  }
  int64_t row(int64_t slot, int64_t part) const { return (slot * parts + part) * kMaxRank; }
  static int64_t stride(int64_t rank) { return (std::max<int64_t>(rank, 0) + 7) / 8 * 8; }
  LoraSlots slots() const {
    return {a.bytes.get(), b.bytes.get(), rank.data(), scale.data(), sizes.data(), count, parts,
            kMaxRank, parts * kMaxRank * a.stride, a.stride, b.stride};
  }
};

void run(int64_t m, int64_t k, const std::vector<int64_t>& sizes, int dtype, int adapter, bool bias,
         int64_t gap, int64_t slots_in_use) {
  std::mt19937 random(static_cast<unsigned>(m * 31 + k * 7 + slots_in_use));
  const Pool pool(slots_in_use + 1, sizes, k, adapter, gap, random);
  const int64_t n = pool.n;
  Matrix x(m, k, gap, dtype), w(n, k, gap, dtype), c(1, n, 0, dtype), y(m, n, gap, dtype);
  for (Matrix* t : {&x, &w, &c, &y}) t->fill(random);
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < m; ++i) slots.push_back(static_cast<int32_t>(random() % (slots_in_use + 1)) - 1);
  multi_lora(x.bytes.get(), w.bytes.get(), bias ? c.bytes.get() : nullptr, y.bytes.get(),
             slots.data(), pool.slots(), m, k, n, x.stride, w.stride, y.stride, dtype, adapter);
  const std::vector<double> xs = x.numbers(), ws = w.numbers(), as = pool.a.numbers();
  for (int64_t i = 0; i < m; ++i) {
    const double* token = xs.data() + i * k;
    const int64_t slot = slots[static_cast<size_t>(i)];
    int64_t first = 0;
    for (int64_t part = 0; part < pool.parts; first += pool.sizes[static_cast<size_t>(part++)]) {
      const size_t at = static_cast<size_t>(slot * pool.parts + part);
      const int64_t r = slot < 0 ? 0 : pool.rank[at], l = Pool::stride(r);
      std::vector<Sum> s(static_cast<size_t>(r));
      for (int64_t q = 0; q < r; ++q)
        s[static_cast<size_t>(q)].add_products(token, as.data() + (pool.row(slot, part) + q) * k, k);
      for (int64_t j = 0; j < pool.sizes[static_cast<size_t>(part)]; ++j) {
        Sum sum;
        sum.add(bias ? c(0, first + j) : 0.0);
        sum.add_products(token, ws.data() + (first + j) * k, k);
        double want = sum.value, size = sum.size;
        for (int64_t q = 0; q < r; ++q) {
          const double up = pool.scale[at] * pool.b(slot, first * kMaxRank + j * l + q);
          want += up * s[static_cast<size_t>(q)].value;
          size += std::fabs(up) * s[static_cast<size_t>(q)].size;
        }
        const double got = y(i, first + j);
        if (!(std::fabs(got - want) <= step_of(dtype) * std::fabs(want) + 1e-6 * size) &&
            failures++ < 5)
          std::printf("m %ld k %ld n %ld dtype %d/%d: y[%ld,%ld] expected %g, got %g\n", m, k, n,
                      dtype, adapter, i, first + j, want, got);
      }
    }
  }
  for (int64_t i = 0; i + 1 < m; ++i)
    for (int64_t j = n; j < y.stride; ++j)
      if (!std::isnan(y(i, j)) && failures++ < 5) std::printf("y[%ld,%ld] was overwritten\n", i, j);
}

void run_alone(int64_t m, int64_t k, int64_t n, int dtype) {
  std::mt19937 random(static_cast<unsigned>(m * 31 + k * 7 + n));
  Matrix x(m, k, 0, dtype), w(n, k, 3, dtype), c(1, n, 0, dtype), y(m, n, 1, dtype);
  for (Matrix* t : {&x, &w, &c, &y}) t->fill(random);
  linear(x.bytes.get(), w.bytes.get(), c.bytes.get(), y.bytes.get(), m, k, n, x.stride, w.stride,
         y.stride, dtype);
  const std::vector<double> xs = x.numbers(), ws = w.numbers();
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      sum.add(c(0, j));
      sum.add_products(xs.data() + i * k, ws.data() + j * k, k);
      const double want = sum.value;
      if (!(std::fabs(y(i, j) - want) <= step_of(dtype) * std::fabs(want) + 1e-6 * sum.size) &&
          failures++ < 5)
        std::printf("linear: m %ld k %ld n %ld dtype %d: y[%ld,%ld] expected %g, got %g\n", m, k, n,
                    dtype, i, j, want, y(i, j));
    }
}

bool refuses(int32_t slot, int64_t rank, int64_t max_rank, int64_t n, int dtype, int adapter,
             const char* message) {
  const float v[64] = {}, scale = 1;
  float y[8] = {};
  const int32_t r = static_cast<int32_t>(rank);
  const int64_t size = 8;
  try {
    multi_lora(v, v, nullptr, y, &slot, {v, v, &r, &scale, &size, 1, 1, max_rank, 8, 1, 64}, 1, 1, n,
               1, 1, 8, dtype, adapter);
  } catch (const std::exception& e) {
    return std::string(e.what()).find(message) != std::string::npos;
  }
  return false;
}

}  // namespace

void multi_lora_checks() {
  const int pairs[][2] = {{0, 0}, {1, 1}, {1, 0}, {2, 2}, {2, 0}};
  for (const auto& [dtype, adapter] : pairs) {
    for (int64_t m : {0, 1, 2, 3, 5, 8, 16, 17, 33, 64, 70})
      for (int64_t k : {1, 31, 96, 129}) run(m, k, {11, 1, 19}, dtype, adapter, m % 2, 3, 1 + m / 2);
    run(9, 40, {49}, dtype, adapter, true, 0, 1);
    run(12, 33, {30, 2}, dtype, adapter, false, 1, 30);
    run(13, 1100, {100, 30}, dtype, adapter, true, 5, 4);  // several tiles, several threads
    run(40, 900, {64, 70}, dtype, adapter, false, 0, 9);   // and several batches
    run(40, 928, {64, 70}, dtype, adapter, true, 2, 9);    // of whole tiles
    run(1, 1088, {130}, dtype, adapter, false, 0, 3);
    run(3, 8, {0}, dtype, adapter, false, 0, 2);
  }
  for (int dtype : {0, 1, 2})
    for (int64_t m : {0, 1, 5, 16, 64}) run_alone(m, 33, 40, dtype), run_alone(m, 1056, 70, dtype);
  if (!refuses(1, 8, 8, 8, 0, 0, "slots: expected -1 (no adapter) or 0..0, got 1") ||
      !refuses(-2, 8, 8, 8, 0, 0, "got -2") || !refuses(0, -1, 8, 8, 0, 0, "holds no adapter") ||
      !refuses(0, 9, 8, 8, 0, 0, "rank: expected <= max_rank, got 9") ||
      !refuses(0, 8, 7, 8, 0, 0, "max_rank: expected a multiple of 8, got 7") ||
      !refuses(0, 8, 8, 7, 0, 0, "sizes: expected a sum of n") ||
      !refuses(0, 8, 8, 8, 1, 2, "adapter_dtype") || !refuses(0, 8, 8, 8, 3, 3, "dtype"))
    ++failures, std::puts("multi_lora: bad arguments were taken");
}
