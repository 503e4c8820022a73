// Part of cpu_driver.cpp, in its namespace: prefix_decode over ragged sizes, dense and in blocks,
// against double.
#pragma once

struct PrefixCase {
  int64_t b, h, hkv, t, s, d, p, block, window;  // block 0: dense
};

void prefix(const PrefixCase& c, int dtype) {
  std::mt19937 random(static_cast<unsigned>(c.b + 3 * c.s + 7 * c.d + 11 * c.t));
  const int64_t slots = 3, blocks = c.block ? (c.s + c.block - 1) / c.block : 0;
  const int64_t tokens = c.block ? c.block : c.s, outer = c.block ? c.b * blocks : c.b;
  Matrix q(c.b * c.h * c.t, c.d, 0, dtype), out(c.b * c.h * c.t, c.d, 0, dtype);
  Matrix k(outer * c.hkv * tokens, c.d, 3, dtype), v(outer * c.hkv * tokens, c.d, 1, dtype);
  Matrix pk(slots * c.hkv * c.p, c.d, 2, dtype), pv(slots * c.hkv * c.p, c.d, 0, dtype);
  for (Matrix* m : {&q, &out, &k, &v, &pk, &pv}) m->fill(random);
  std::vector<int32_t> slot(c.b), length(c.b), table(c.b * blocks);
  const int32_t of_slot[slots] = {static_cast<int32_t>(c.p), 0, static_cast<int32_t>(c.p / 2)};
  for (int64_t i = 0; i < c.b; ++i) {
    slot[i] = static_cast<int32_t>(random() % 4) - 1;
    length[i] = static_cast<int32_t>(random() % (c.s + 1));
  }
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(table.size() - 1 - i);
  std::vector<float> lse(c.b * c.h * c.t);
  const auto keys = [&](const Matrix& m, int64_t tokens) {
    return Keys{m.bytes.get(), c.hkv * tokens * m.stride, tokens * m.stride, m.stride};
  };
  prefix_decode(q.bytes.get(), keys(k, tokens), keys(v, tokens), keys(pk, c.p), keys(pv, c.p),
                slot.data(), of_slot, length.data(), c.block ? table.data() : nullptr,
                out.bytes.get(), lse.data(), c.b, c.h, c.hkv, c.t, c.s, c.d, slots, c.p, blocks,
                c.block, outer, 0.25, c.window, dtype);
  const double step = dtype == kFloat32 ? 0 : dtype == kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  const double least = dtype == kFloat16 ? 0x1p-25 : 0;  // half the distance of subnormal halves
  for (int64_t row = 0; row < q.rows; ++row) {
    const int64_t i = row / c.t % c.h, r = row / c.t / c.h, at = length[r] - c.t + row % c.t;
    const int64_t head = i / (c.h / c.hkv);
    std::vector<double> weight;
    std::vector<int64_t> where;  // rows of pk and pv, then of k and v
    const auto see = [&](const Matrix& m, int64_t key) {
      double score = 0;
      for (int64_t j = 0; j < c.d; ++j) score += 0.25 * q(row, j) * m(key, j);
      weight.push_back(score), where.push_back(key);
    };
    const int64_t of_prefix = slot[r] < 0 ? 0 : of_slot[slot[r]];
    for (int64_t j = 0; j < of_prefix; ++j) see(pk, (slot[r] * c.hkv + head) * c.p + j);
    for (int64_t j = c.window ? std::max<int64_t>(0, at - c.window + 1) : 0; j <= at; ++j) {
      const int64_t o = c.block ? table[r * blocks + j / c.block] : r;
      see(k, (o * c.hkv + head) * tokens + (c.block ? j % c.block : j));
    }
    const double top = weight.empty() ? 0 : *std::max_element(weight.begin(), weight.end());
    double total = 0;
    for (double& w : weight) total += w = std::exp(w - top);
    const double want_lse = top + std::log(total);
    if (!(std::fabs(lse[row] - want_lse) <= 2e-6 * (1 + std::fabs(want_lse))) &&
        !(weight.empty() && lse[row] == -INFINITY) && failures++ < 5)
      std::printf("prefix: lse[%ld] expected %g, got %g\n", row, want_lse, lse[row]);
    for (int64_t j = 0; j < c.d; ++j) {
      double want = 0, size = 0;
      for (size_t n = 0; n < weight.size(); ++n) {
        const double term = weight[n] / total * (int64_t(n) < of_prefix ? pv : v)(where[n], j);
        want += term, size += std::fabs(term);
      }
      if (!(std::fabs(out(row, j) - want) <= step * std::fabs(want) + 3e-6 * size + least) &&
          failures++ < 5)
        std::printf("prefix b %ld h %ld/%ld t %ld s %ld d %ld p %ld dtype %d: out[%ld,%ld] expected "
                    "%g, got %g\n", c.b, c.h, c.hkv, c.t, c.s, c.d, c.p, dtype, row, j, want,
                    out(row, j));
    }
  }
}

bool refuses_prefix(int32_t slot, int32_t length, int32_t block, int64_t d) {
  float q[8] = {}, k[8] = {}, lse[1];
  const Keys keys = {k, 8, 8, 8};
  const int32_t held[2] = {1, -1};
  try {
    prefix_decode(q, keys, keys, keys, keys, &slot, held, &length, &block, q, lse, 1, 1, 1, 1, 1, d,
                  2, 1, 1, 1, 1, 1.0, 0, kFloat32);
  } catch (const std::exception& e) {
    return std::string(e.what()).find("slot") != std::string::npos ||
           std::string(e.what()).find("expected") != std::string::npos;
  }
  return false;
}

void prefixes() {
  for (int dtype : {0, 1, 2}) {
    for (int64_t d : {1, 8, 33, 64, 96, 200})
      for (const PrefixCase& c : {PrefixCase{5, 4, 2, 1, 70, d, 40, 0, 0},
                                  PrefixCase{7, 2, 2, 1, 64, d, 33, 16, 0},
                                  PrefixCase{3, 6, 2, 8, 50, d, 9, 7, 0},
                                  PrefixCase{4, 4, 1, 3, 90, d, 0, 0, 11}})
        prefix(c, dtype);
    prefix({2, 8, 8, 1, 700, 32, 600, 0, 0}, dtype);  // several chunks, several threads
    prefix({40, 4, 2, 2, 5, 16, 20, 0, 2}, dtype);     // more than are taken together
    prefix({0, 4, 2, 1, 5, 16, 20, 0, 0}, dtype), prefix({2, 4, 2, 1, 0, 16, 3, 0, 0}, dtype);
  }
  if (!refuses_prefix(2, 1, 0, 8) || !refuses_prefix(-2, 1, 0, 8) || !refuses_prefix(1, 1, 0, 8) ||
      !refuses_prefix(0, 2, 0, 8) || !refuses_prefix(0, 1, 1, 8) || !refuses_prefix(0, 1, 0, 0))
    ++failures, std::puts("bad arguments of prefix_decode were taken");
}
