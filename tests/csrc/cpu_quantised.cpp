// Part of cpu_driver.cpp: W in 4 and 8 bits, of ragged sizes and from any place on, against double.
#include <string>
#include <vector>

#include "cpu_matrix.h"

using namespace fusedpeft::cpu;

namespace {

constexpr double kCode[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0};

double e4m3(int code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return (code & 127) == 127 ? NAN : code & 128 ? -size : size;
}

// Each tensor ends with its allocation.
struct Weight {
  std::vector<uint8_t> codes, fine;
  std::vector<float> scale, book, coarse, offset;
  Quantised q{};

  Weight(int64_t n, int64_t k, int64_t block, bool second, std::mt19937& random)
      : codes(static_cast<size_t>(block ? n * k / 2 : n * k)), offset{0.5f} {
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random() % 256);
    const auto eighths = [&] { return static_cast<float>(random() % 8 + 1) / 8; };
    for (uint8_t& code : codes)  // NaN has a check of its own
      if (!block && (code & 127) == 127) code = 0x38;
    const int64_t blocks = block ? (n * k + block - 1) / block : second ? n : 1;
    for (int64_t i = 0; i < blocks; ++i) scale.push_back(eighths());
    q = {codes.data(), scale.data(), nullptr, nullptr, nullptr, n, k, block, !block && second};
    if (!block || !second) return;
    for (int i = 0; i < 256; ++i) book.push_back(eighths());
    for (int64_t i = 0; i < blocks; ++i) fine.push_back(static_cast<uint8_t>(random() % 256));
    for (int64_t i = 0; i < blocks; i += 256) coarse.push_back(eighths());
    q.scale = fine.data(), q.book = book.data(), q.absmax2 = coarse.data(), q.offset = offset.data();
  }

  double operator()(int64_t i, int64_t j) const {
    const auto e = static_cast<size_t>(i * q.k + j);
    if (!q.block) return e4m3(codes[e]) * scale[q.by_row ? static_cast<size_t>(i) : 0];
    const size_t block = e / static_cast<size_t>(q.block);
    const double factor =
        q.book ? double{book[fine[block]]} * coarse[block / 256] + 0.5 : double{scale[block]};
    return kCode[e % 2 ? codes[e / 2] & 15 : codes[e / 2] >> 4] * factor;
  }
};

void wrong(const char* what, const Quantised& w, int64_t i, int64_t j, double want, double got) {
  if (failures++ < 5)
    std::printf("%s %ldx%ld block %ld [%ld,%ld]: expected %g, got %g\n", what, w.n, w.k, w.block, i,
                j, want, got);
}

void rows(int64_t n, int64_t k, int64_t block, bool second, int dtype) {
  std::mt19937 random(static_cast<unsigned>(n + 7 * k + block));
  const Weight w(n, k, block, second, random);
  for (const auto& [row, col] : {std::pair<int64_t, int64_t>{0, 0}, {n / 2, k / 3 / 2 * 2}}) {
    const int64_t cols = col ? (k - col) / 2 : k;
    Matrix out(n - row, cols, 3, dtype);
    for (int64_t i = 0; i < out.rows; ++i) out.poison(i, 0, i + 1 < out.rows ? out.stride : cols);
    dequantise(w.q, out.bytes.get(), row, out.rows, col, cols, out.stride, dtype);
    for (int64_t i = 0; i < out.rows; ++i)
      for (int64_t j = 0; j < (i + 1 < out.rows ? out.stride : cols); ++j) {
        const double want = j < cols ? w(row + i, col + j) : NAN;
        const double most = step_of(dtype) * std::fabs(want);  // half of it, and fp32's own
        if (j < cols ? !(std::fabs(out(i, j) - want) <= most) : !std::isnan(out(i, j)))
          wrong("dequantise", w.q, row + i, col + j, want, out(i, j));
      }
  }
}

void decode(int64_t m, int64_t n, int64_t k, int64_t block, bool second, int dtype, int adapter) {
  std::mt19937 random(static_cast<unsigned>(m + 3 * n + 7 * k + block));
  constexpr int64_t r = 5;
  const Weight w(n, k, block, second, random);
  Matrix x(m, k, 1, dtype), a(r, k, 2, adapter), b(n, r, 3, adapter), c(1, n, 0, dtype),
      y(m, n, 1, dtype);
  for (Matrix* t : {&x, &a, &b, &c, &y}) t->fill(random);
  lora_decode_quantised(x.bytes.get(), w.q, a.bytes.get(), b.bytes.get(), c.bytes.get(),
                        y.bytes.get(), m, r, x.stride, a.stride, b.stride, y.stride, 0.25, dtype,
                        adapter);
  const std::vector<double> xs = x.numbers(), as = a.numbers(), bs = b.numbers();
  std::vector<double> ws;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t l = 0; l < k; ++l) ws.push_back(w(j, l));
  for (int64_t i = 0; i < m; ++i) {
    double s[r];
    for (int64_t q = 0; q < r; ++q) {
      Sum of_s;
      of_s.add_products(xs.data() + i * k, as.data() + q * k, k);
      s[q] = 0.25 * of_s.value;
    }
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      sum.add(c(0, j));
      sum.add_products(xs.data() + i * k, ws.data() + j * k, k);
      sum.add_products(s, bs.data() + j * r, r);
      // Half of a step for y, and for each number of W where the products take it in 16 bits.
      const double step = step_of(dtype), want = sum.value;
      if (!(std::fabs(y(i, j) - want) <= step * std::fabs(want) + 1e-6 * sum.size))
        wrong("decode", w.q, i, j, want, y(i, j));
    }
  }
}

bool refuses(int64_t k, int64_t block, int64_t row, int64_t col, int dtype) {
  const uint8_t codes[64] = {};
  const float scale[64] = {};
  float out[64];
  const Quantised w = {codes, scale, nullptr, nullptr, nullptr, 2, k, block, false};
  try {
    dequantise(w, out, row, 1, col, 2, 2, dtype);
  } catch (const std::exception& e) {
    return std::string(e.what()).find("expected") != std::string::npos;
  }
  return false;
}

}  // namespace

void quantised_checks() {
  for (int64_t block : {0, 64, 128, 4096})
    for (bool second : {false, true}) {
      for (int dtype : {0, 1, 2}) {
        rows(1, 2, block, second, dtype), rows(7, 30, block, second, dtype);
        rows(5, 70, block, second, dtype), rows(3, 1090, block, second, dtype);
        rows(0, 8, block, second, dtype), rows(4, 0, block, second, dtype);
      }
      rows(130, 1024, block, second, 1);  // several threads
      const int pairs[][2] = {{0, 0}, {1, 1}, {1, 0}, {2, 2}, {2, 0}};
      for (const auto& [dtype, adapter] : pairs) {
        for (int64_t m : {0, 1, 4, 6, 16, 17}) decode(m, 9, 70, block, second, dtype, adapter);
        decode(2, 5, 0, block, second, dtype, adapter), decode(3, 0, 8, block, second, dtype, adapter);
        decode(5, 13, 1090, block, second, dtype, adapter);
        decode(3, 200, 1152, block, second, dtype, adapter);
      }
    }
  if (!refuses(8, 64, 0, 1, 0) || !refuses(8, 64, 2, 0, 0) || !refuses(7, 64, 0, 0, 0) ||
      !refuses(8, 32, 0, 0, 0) || !refuses(8, 64, 0, 8, 0) || !refuses(8, 64, 0, 0, 3))
    ++failures, std::puts("bad arguments were taken (quantised)");
}
