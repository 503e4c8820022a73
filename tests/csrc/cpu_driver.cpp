// Ragged shapes through csrc/cpu against sums in double, for AddressSanitizer and UBSan.
#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "cpu_matrix.h"

using namespace fusedpeft::cpu;

namespace {

void decode(int64_t m, int64_t k, int64_t n, int64_t r, int dtype, int adapter, bool bias, int gap) {
  std::mt19937 random(static_cast<unsigned>(m * 31 + k * 7 + n * 3 + r));
  Matrix x(m, k, gap, dtype), w(n, k, gap, dtype), a(r, k, gap, adapter), b(n, r, gap, adapter),
      c(1, n, 0, dtype), y(m, n, gap, dtype);
  for (Matrix* t : {&x, &w, &a, &b, &c, &y}) t->fill(random);
  lora_decode(x.bytes.get(), w.bytes.get(), a.bytes.get(), b.bytes.get(),
              bias ? c.bytes.get() : nullptr, y.bytes.get(), m, k, n, r, x.stride, w.stride,
              a.stride, b.stride, y.stride, 0.25, dtype, adapter);
  const double step = step_of(dtype);
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> s(static_cast<size_t>(r));
    for (int64_t q = 0; q < r; ++q)
      for (int64_t l = 0; l < k; ++l) s[static_cast<size_t>(q)] += x(i, l) * a(q, l);
    for (int64_t j = 0; j < n; ++j) {
      double want = bias ? c(0, j) : 0.0, size = std::fabs(want);
      const auto add = [&](double term) { want += term, size += std::fabs(term); };
      for (int64_t l = 0; l < k; ++l) add(x(i, l) * w(j, l));
      for (int64_t q = 0; q < r; ++q) add(0.25 * s[static_cast<size_t>(q)] * b(j, q));
      if (!(std::fabs(y(i, j) - want) <= step * std::fabs(want) + 1e-6 * size)) {
        if (failures++ < 5)
          std::printf("m %ld k %ld n %ld r %ld dtype %d/%d: y[%ld,%ld] expected %g, got %g\n", m, k,
                      n, r, dtype, adapter, i, j, want, y(i, j));
      }
    }
  }
  for (int64_t i = 0; i + 1 < m; ++i)
    for (int64_t j = n; j < y.stride; ++j)
      if (!std::isnan(y(i, j)) && failures++ < 5) std::printf("y[%ld,%ld] was overwritten\n", i, j);
}

void drop(int64_t rows, int64_t cols, int dtype, int gap) {
  std::mt19937 random(7);
  Matrix x(rows, cols, gap, dtype), out(rows, cols, 2 * gap, dtype);
  x.fill(random), out.fill(random);
  dropout(x.bytes.get(), out.bytes.get(), rows, cols, x.stride, out.stride, 0.5, -3, dtype);
  int64_t kept = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      kept += out(i, j) != 0;
      if (out(i, j) != 0 && out(i, j) != 2 * x(i, j) && failures++ < 5)
        std::printf("dropout [%ld,%ld]: expected %g or 0, got %g\n", i, j, 2 * x(i, j), out(i, j));
    }
  if (rows * cols > 1000 && std::fabs(static_cast<double>(kept) / (rows * cols) - 0.484) > 0.05 &&
      failures++ < 5)
    std::printf("dropout %ldx%ld: kept %ld\n", rows, cols, kept);
}

bool refuses(int64_t m, int64_t r, int dtype, int adapter) {
  float v[4] = {};
  try {
    lora_decode(v, v, v, v, nullptr, v, m, 1, 1, r, 1, 1, 1, 1, 1, 1.0, dtype, adapter);
  } catch (const std::exception& e) {
    return std::string(e.what()).find("expected") != std::string::npos;
  }
  return false;
}

#include "cpu_adapters.h"
#include "cpu_prefix.h"

}  // namespace

int main() {
  adapters();
  const int pairs[][2] = {{0, 0}, {1, 1}, {1, 0}, {2, 2}, {2, 0}};
  for (const auto& [dtype, adapter] : pairs) {
    for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 19})
      for (int64_t k : {0, 1, 31, 129}) decode(m, k, 23, 5, dtype, adapter, m % 2, 3);
    for (int64_t r : {1, 8, 17, 64, 100}) decode(5, 40, 9, r, dtype, adapter, true, 0);
    for (int64_t n : {0, 1, 2, 30, 49}) decode(3, 33, n, 4, dtype, adapter, false, 1);
    decode(13, 1100, 130, 16, dtype, adapter, true, 5);  // two tiles and a tail, several threads
    decode(1, 700, 1000, 3, dtype, adapter, true, 0);
    for (int64_t m : {1, 3, 16, 19}) decode(m, 1088, 70, 48, dtype, adapter, m % 2, 2);
    decode(2, 0, 20, 8, dtype, adapter, true, 0);
  }
  for (int dtype : {0, 1, 2}) {
    drop(0, 5, dtype, 0), drop(1, 1, dtype, 0), drop(3, 63, dtype, 1), drop(40, 1000, dtype, 3);
    drop(2, 64, dtype, 0);
  }
  multi_lora_checks();
  prefix_train_checks();
  quantised_checks();
  if (!refuses(-1, 1, 0, 0) || !refuses(1, 0, 0, 0) || !refuses(1, 1, 3, 3) || !refuses(1, 1, 1, 2))
    ++failures, std::puts("bad arguments were taken");
  prefixes();
  std::printf("%s: %d failures\n", cpu_capability(), failures);
  return failures != 0;
}
