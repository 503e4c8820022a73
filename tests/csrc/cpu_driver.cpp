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
  const std::vector<double> xs = x.numbers(), ws = w.numbers(), as = a.numbers(), bs = b.numbers();
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> s;
    for (int64_t q = 0; q < r; ++q) {
      Sum of_s;
      of_s.add_products(xs.data() + i * k, as.data() + q * k, k);
      s.push_back(0.25 * of_s.value);
    }
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      sum.add(bias ? c(0, j) : 0.0);
      sum.add_products(xs.data() + i * k, ws.data() + j * k, k);
      sum.add_products(s.data(), bs.data() + j * r, r);
      const double want = sum.value;
      if (!(std::fabs(y(i, j) - want) <= step * std::fabs(want) + 1e-6 * sum.size)) {
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

void norm(int64_t m, int64_t d, int dtype, bool backward) {
  std::mt19937 random(3);
  Matrix x(m, d, 0, dtype), w(1, d, 0, dtype), dy(m, d, 0, dtype), out(m, d, 0, dtype);
  for (Matrix* t : {&x, &w, &dy, &out}) t->fill(random);
  rms_norm({x.bytes.get(), w.bytes.get(), backward ? dy.bytes.get() : nullptr, out.bytes.get(), m, d,
            0.5f, 1.0f, dtype});
  for (int64_t i = 0; i < m; ++i) {
    double squares = 0, products = 0, size = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double term = x(i, j) * (w(0, j) + 1) * dy(i, j);
      squares += x(i, j) * x(i, j), products += term, size += std::fabs(term);
    }
    const double r = 1 / std::sqrt(squares / d + 0.5);
    for (int64_t j = 0; j < d; ++j) {
      const double v = w(0, j) + 1, far = x(i, j) * r * r / d;
      const double want = backward ? r * (v * dy(i, j) - far * products) : x(i, j) * r * v;
      const double room = step_of(dtype) * std::fabs(want) + 1e-6 * (1 + (backward ? size * std::fabs(far) : 0));
      if (!(std::fabs(out(i, j) - want) <= room + 4e-7 * std::fabs(want) * (dtype == 0)) &&
          failures++ < 5)
        std::printf("rms_norm %ldx%ld dtype %d dy %d [%ld,%ld]: expected %g, got %g\n", m, d, dtype,
                    backward, i, j, want, out(i, j));
    }
  }
}

void gate(int64_t rows, int64_t width, int dtype, bool backward, int gap) {
  std::mt19937 random(4);
  Matrix g(rows, width, gap, dtype), u(rows, width, 2 * gap, dtype), dy(rows, width, 0, dtype),
      out(rows, width, 0, dtype), dup(rows, width, 0, dtype);
  for (Matrix* t : {&g, &u, &dy, &out, &dup}) t->fill(random);
  gated({g.bytes.get(), u.bytes.get(), backward ? dy.bytes.get() : nullptr, out.bytes.get(),
         dup.bytes.get(), rows, width, g.stride, u.stride, kSilu, dtype});
  const auto near = [&](double got, double want) {
    return std::fabs(got - want) <= step_of(dtype) * std::fabs(want) + 2e-6;
  };
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) {
      const double s = 1 / (1 + std::exp(-g(i, j))), silu = g(i, j) * s;
      const double slope = s * (1 + g(i, j) * (1 - s));
      const double want = backward ? dy(i, j) * u(i, j) * slope : silu * u(i, j);
      if ((!near(out(i, j), want) || (backward && !near(dup(i, j), silu * dy(i, j)))) &&
          failures++ < 5)
        std::printf("gated %ldx%ld dtype %d dy %d [%ld,%ld]: expected %g, got %g\n", rows, width, dtype,
                    backward, i, j, want, out(i, j));
    }
}

// x of [b, t, h, d] with heads and tokens changed about, out of [b, h, t, d].
void turn(int64_t b, int64_t h, int64_t t, int64_t d, int dtype, bool backward, int gap) {
  std::mt19937 random(5);
  Matrix x(b * t * h, d, gap, dtype), out(b * h * t, d, gap, dtype), cos(t, d, gap, dtype),
      sin(b * t, d, 0, dtype);
  for (Matrix* of : {&x, &out, &cos, &sin}) of->fill(random);
  const int64_t sx = x.stride, so = out.stride;
  rotary({x.bytes.get(), cos.bytes.get(), sin.bytes.get(), out.bytes.get(), b, h, t, d, t * h * sx, sx,
          h * sx, 0, cos.stride, t * d, d, h * t * so, t * so, so, backward, dtype});
  const int64_t half = d / 2;
  for (int64_t i = 0; i < b * h * t; ++i)
    for (int64_t j = 0; j < d; ++j) {
      const int64_t of_b = i / (h * t), of_h = i / t % h, of_t = i % t, row = (of_b * t + of_t) * h + of_h;
      const int64_t other = j < half ? j + half : j - half;
      const double turned = x(row, other) * sin(of_b * t + of_t, backward ? other : j);
      const double sign = (j < half) != backward ? -1 : 1;
      const double want = x(row, j) * cos(of_t, j) + sign * turned;
      if (!(std::fabs(out(i, j) - want) <= step_of(dtype) * std::fabs(want) + 1e-6) && failures++ < 5)
        std::printf("rotary %ldx%ldx%ldx%ld dtype %d dy %d [%ld,%ld]: expected %g, got %g\n", b, h, t, d,
                    dtype, backward, i, j, want, out(i, j));
    }
  for (int64_t i = 0; i + 1 < b * h * t; ++i)
    for (int64_t j = d; j < so; ++j)
      if (!std::isnan(out(i, j)) && failures++ < 5) std::printf("rotary wrote behind row %ld\n", i);
}

void soft(int64_t rows, int64_t cols, bool write) {
  std::mt19937 random(6);
  Matrix given(rows, cols, 0, 0), z(rows, cols, 0, 0), lse(1, rows, 0, 0);
  given.fill(random), lse.fill(random);
  std::memcpy(z.bytes.get(), given.bytes.get(), static_cast<size_t>(rows * cols * 4));
  softmax(reinterpret_cast<float*>(z.bytes.get()), reinterpret_cast<float*>(lse.bytes.get()), rows, cols,
          write);
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0;
    for (int64_t j = 0; j < cols; ++j) total += std::exp(given(i, j));
    bool ok = std::fabs(lse(0, i) - std::log(total)) < 1e-6 * (1 + std::fabs(std::log(total)));
    for (int64_t j = 0; j < cols; ++j) {
      const double want = write ? std::exp(given(i, j)) / total : given(i, j);
      ok = ok && std::fabs(z(i, j) - want) <= 1e-6 * std::fabs(want);
    }
    if (!ok && failures++ < 5) std::printf("softmax %ldx%ld write %d: row %ld\n", rows, cols, write, i);
  }
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
  for (bool write : {false, true})
    for (int64_t cols : {1, 15, 64, 1000, 5003}) soft(3, cols, write), soft(40, cols, write);
  for (int dtype : {0, 1, 2}) {
    for (bool backward : {false, true}) {
      turn(1, 1, 1, 2, dtype, backward, 0), turn(2, 3, 5, 6, dtype, backward, 1);
      turn(2, 2, 40, 64, dtype, backward, 0), turn(1, 2, 3, 546, dtype, backward, 3);
    }
    drop(0, 5, dtype, 0), drop(1, 1, dtype, 0), drop(3, 63, dtype, 1), drop(40, 1000, dtype, 3);
    drop(2, 64, dtype, 0);
    for (bool backward : {false, true}) {
      norm(1, 1, dtype, backward), norm(3, 31, dtype, backward), norm(70, 600, dtype, backward);
      gate(1, 1, dtype, backward, 0), gate(1, 40000, dtype, backward, 0);
      gate(3, 255, dtype, backward, 2), gate(70, 257, dtype, backward, 9);
    }
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
