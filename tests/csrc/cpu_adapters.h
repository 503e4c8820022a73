// Bottleneck adapters by token, for cpu_driver.cpp, which has what is used here.
#pragma once

// Slots of sizes 5, 0 and 17, each a row of a matrix: what lies behind an adapter of 5 is NaN.
void adapt(int64_t m, int64_t d, int norm, int activation, int dtype, int adapter, bool residual) {
  const int32_t size[] = {5, 0, 17};
  const float scale[] = {0.5f, 3.0f, -0.25f};
  const int64_t most = 24;
  std::mt19937 random(static_cast<unsigned>(m * 31 + d));
  Matrix x(m, d, 3, dtype), base(m, d, 1, dtype), y(m, d, 0, dtype), down(3, most * d, 2, adapter),
      c(3, most, 1, adapter), up(3, most * d, 0, adapter), e(3, d, 5, adapter),
      w(3, d, 4, adapter), b(3, d, 0, adapter);
  for (Matrix* t : {&x, &base, &y, &down, &c, &up, &e, &w, &b}) t->fill(random);
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < m; ++i) slots.push_back(static_cast<int32_t>(random() % 4) - 1);
  for (int s = 0; s < 3; ++s) {
    const int64_t stride = (size[s] + 7) / 8 * 8;
    for (int64_t i = size[s] * d; i < most * d; ++i) std::memset(down.at(s, i), 0xff, down.size());
    for (int64_t i = 0; i < most * d; ++i)
      if (i >= stride * d || i % stride >= size[s])
        std::memset(up.at(s, i), i < stride * d ? 0 : 0xff, up.size());
  }
  const float eps = 0.01f;
  adapter_decode({x.bytes.get(), residual ? base.bytes.get() : nullptr, y.bytes.get(), slots.data(),
                  size, scale, down.bytes.get(), c.bytes.get(), up.bytes.get(), e.bytes.get(),
                  norm ? w.bytes.get() : nullptr, norm == kLayerNorm ? b.bytes.get() : nullptr, 3,
                  m, d, x.stride, base.stride, y.stride, d, 0, down.stride, c.stride, up.stride,
                  e.stride, w.stride, b.stride, eps, norm, activation, dtype, adapter, most});
  const double step = step_of(dtype);
  for (int64_t i = 0; i < m; ++i) {
    const int s = slots[i], n = s < 0 ? 0 : size[s];
    double mean = 0, square = 0;
    for (int64_t j = 0; j < d; ++j) mean += norm == kLayerNorm ? x(i, j) / d : 0;
    for (int64_t j = 0; j < d; ++j) square += (x(i, j) - mean) * (x(i, j) - mean) / d;
    std::vector<double> h(n);
    for (int r = 0; r < n; ++r) {
      double p = c(s, r);
      for (int64_t j = 0; j < d; ++j) {
        double v = x(i, j);
        if (norm) v = (v - mean) / std::sqrt(square + eps) * w(s, j);
        if (norm == kLayerNorm) v += b(s, j);
        p += v * down(s, r * d + j);
      }
      h[r] = activation == kTanh   ? std::tanh(p)
             : activation == kGelu ? p * std::erfc(-p * std::sqrt(0.5)) / 2
             : activation == kSilu ? p / (1 + std::exp(-p))
             : activation == kRelu ? std::fmax(p, 0)
             : activation == kLeakyRelu ? (p > 0 ? p : 0.01 * p)
             : p / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (p + 0.044715 * p * p * p)));
    }
    for (int64_t j = 0; j < d; ++j) {
      double want = n ? e(s, j) * scale[s] : 0, size_of = 1;
      for (int r = 0; r < n; ++r) {
        const double term = scale[s] * h[r] * up(s, j * ((n + 7) / 8 * 8) + r);
        want += term, size_of += std::fabs(term);
      }
      want += residual ? base(i, j) : 0;
      if (!(std::fabs(y(i, j) - want) <= step * std::fabs(want) + 4e-6 * size_of) && failures++ < 5)
        std::printf("adapters m %ld d %ld norm %d act %d dtype %d/%d: y[%ld,%ld] expected %g, got %g\n",
                    m, d, norm, activation, dtype, adapter, i, j, want, y(i, j));
    }
  }
}

double gelu(double p) { return p * std::erfc(-p * std::sqrt(0.5)) / 2; }

// y and the weights' gradients against sums in double, from P as it was kept.
void weights_of(const AdapterTrain& a, const Matrix& x, const Matrix& dy, const Matrix& y,
                const Matrix& down, const Matrix& up, const Matrix& b, const Matrix& w, const Matrix& p,
                const Matrix& ddown, const Matrix& dc, const Matrix& dup, const Matrix& db,
                const Matrix& dw, const Matrix& dnb) {
  const int64_t m = a.m, d = a.d, e = a.e;
  const Sum one = {0, 1};
  std::vector<Sum> of_down(e * d, one), of_c(e, one), of_up(d * e, one), of_b(d, one), of_w(d, one),
      of_nb(d, one);
  const double slack = a.dtype || a.adapter_dtype ? 1e-2 : 2e-5;
  const auto compare = [&](const char* name, double got, const Sum& want) {
    if (!(std::fabs(got - want.value) <= slack * want.size) && failures++ < 5)
      std::printf("train m %ld d %ld e %ld norm %d dtype %d/%d: %s expected %g, got %g\n", m, d, e,
                  a.norm, a.dtype, a.adapter_dtype, name, want.value, got);
  };
  for (int64_t i = 0; i < m; ++i) {
    double mean = 0, square = 0;
    for (int64_t j = 0; j < d; ++j) mean += a.norm == kLayerNorm ? x(i, j) / d : 0;
    for (int64_t j = 0; j < d; ++j) square += (x(i, j) - mean) * (x(i, j) - mean) / d;
    std::vector<double> n(d), of_n(d), h(e);
    for (int64_t r = 0; r < e; ++r) h[r] = gelu(p(i, r));
    for (int64_t j = 0; j < d; ++j)
      n[j] = a.norm ? (x(i, j) - mean) / std::sqrt(square + a.eps) : x(i, j);
    for (int64_t j = 0; j < d; ++j) {
      Sum of_y = one;
      of_y.add(x(i, j) + a.scale * b(0, j));
      for (int64_t r = 0; r < e; ++r) of_y.add(a.scale * h[r] * up(j, r));
      compare("y", y(i, j), of_y);
      of_b[j].add(a.scale * dy(i, j));
    }
    for (int64_t r = 0; r < e; ++r) {
      const double v = p(i, r);
      double slope = std::erfc(-v * std::sqrt(0.5)) / 2 + v * std::exp(-v * v / 2) / std::sqrt(2 * M_PI);
      double g = 0;
      for (int64_t j = 0; j < d; ++j) {
        of_up[j * e + r].add(a.scale * h[r] * dy(i, j));
        g += dy(i, j) * up(j, r);
      }
      g *= a.scale * slope;
      of_c[r].add(g);
      for (int64_t j = 0; j < d; ++j) {
        const double to_n = a.norm ? w(0, j) * n[j] + (a.norm == kLayerNorm ? b(0, j) : 0) : n[j];
        of_down[r * d + j].add(g * to_n);
        of_n[j] += g * down(r, j);
      }
    }
    for (int64_t j = 0; j < d; ++j) of_w[j].add(of_n[j] * n[j]), of_nb[j].add(of_n[j]);
  }
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t r = 0; r < e; ++r) {
      compare("dD", ddown(r, j), of_down[r * d + j]);
      compare("dU", dup(j, r), of_up[j * e + r]);
    }
    compare("de", db(0, j), of_b[j]);
    if (a.norm) compare("dgamma", dw(0, j), of_w[j]);
    if (a.norm == kLayerNorm) compare("dbeta", dnb(0, j), of_nb[j]);
  }
  for (int64_t r = 0; r < e; ++r) compare("dc", dc(0, r), of_c[r]);
}

// Forward and backward of one adapter; that it reads and writes within bounds, and dx against
// differences of y.
void train(int64_t m, int64_t d, int64_t e, int norm, int dtype, int adapter, bool needed) {
  std::mt19937 random(static_cast<unsigned>(m * 31 + d * 7 + e));
  Matrix x(m, d, 0, dtype), dy(m, d, 0, dtype), y(m, d, 0, dtype), dx(m, d, 0, dtype),
      down(e, d, 0, adapter), c(1, e, 0, adapter), up(d, e, 0, adapter), b(1, d, 0, adapter),
      w(1, d, 0, adapter), p(m, e, 0, adapter), ddown(e, d, 0, adapter), dc(1, e, 0, adapter),
      dup(d, e, 0, adapter), db(1, d, 0, adapter), dw(1, d, 0, adapter), dnb(1, d, 0, adapter);
  for (Matrix* t : {&x, &dy, &down, &c, &up, &b, &w}) t->fill(random);
  std::vector<float> stats(2 * m), work(2 * ((m + 31) / 32 * 32) * ((e + 15) / 16 * 16) + 16);
  AdapterTrain a = {};
  a.x = a.residual = x.bytes.get(), a.y = y.bytes.get(), a.p = p.bytes.get(), a.stats = stats.data();
  a.down = down.bytes.get(), a.down_bias = c.bytes.get();
  a.up = up.bytes.get(), a.up_bias = b.bytes.get();
  a.norm_weight = norm ? w.bytes.get() : nullptr;
  a.norm_bias = norm == kLayerNorm ? b.bytes.get() : nullptr;
  a.m = m, a.d = d, a.e = e, a.scale = 0.5f, a.eps = 0.01f;
  a.norm = norm, a.activation = kGelu, a.dtype = dtype, a.adapter_dtype = adapter;
  adapter_train(a);
  a.dy = dy.bytes.get(), a.dx = dx.bytes.get(), a.work = work.data(), a.add_dy = true;
  if (needed) {
    a.ddown = ddown.bytes.get(), a.ddown_bias = dc.bytes.get();
    a.dup = dup.bytes.get(), a.dup_bias = db.bytes.get();
    a.dnorm_weight = norm ? dw.bytes.get() : nullptr;
    a.dnorm_bias = norm == kLayerNorm ? dnb.bytes.get() : nullptr;
  }
  adapter_train(a);
  if (needed) weights_of(a, x, dy, y, down, up, b, w, p, ddown, dc, dup, db, dw, dnb);
  for (int64_t i = 0; i < m; i += 7) {
    const auto value = [&](double step) {  // of dy y, where x[i] has moved by step * direction
      double mean = 0, square = 0, total = 0;
      const auto at = [&](int64_t j) { return x(i, j) + step * ((j * 5 + 1) % 3 - 1.0); };
      for (int64_t j = 0; j < d; ++j) mean += norm == kLayerNorm ? at(j) / d : 0;
      for (int64_t j = 0; j < d; ++j) square += (at(j) - mean) * (at(j) - mean) / d;
      std::vector<double> h(e);
      for (int64_t r = 0; r < e; ++r) {
        double sum = c(0, r);
        for (int64_t j = 0; j < d; ++j) {
          double v = at(j);
          if (norm) v = (v - mean) / std::sqrt(square + a.eps) * w(0, j);
          if (norm == kLayerNorm) v += b(0, j);
          sum += v * down(r, j);
        }
        h[r] = gelu(sum);
      }
      for (int64_t j = 0; j < d; ++j) {
        double u = b(0, j);
        for (int64_t r = 0; r < e; ++r) u += h[r] * up(j, r);
        total += dy(i, j) * (at(j) + a.scale * u);
      }
      return total;
    };
    double got = 0, size = 1;
    for (int64_t j = 0; j < d; ++j) {
      const double term = dx(i, j) * ((j * 5 + 1) % 3 - 1.0);
      got += term, size += std::fabs(term);
    }
    const double want = (value(1e-4) - value(-1e-4)) / 2e-4;
    const double slack = (dtype || adapter ? 2e-2 : 2e-5) * size;  // P is kept in the adapter's dtype
    if (!(std::fabs(got - want) <= slack) && failures++ < 5)
      std::printf("train m %ld d %ld e %ld norm %d dtype %d/%d: row %ld expected %g, got %g\n", m, d,
                  e, norm, dtype, adapter, i, want, got);
  }
}

bool refuses_slot(int32_t slot, int32_t size) {
  float v[64] = {}, scale = 1;
  try {
    adapter_decode({v, v, v, &slot, &size, &scale, v, v, v, v, nullptr, nullptr, 1, 1, 4, 4, 4, 4,
                    4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8});
  } catch (const std::exception&) {
    return true;
  }
  return false;
}

void adapters() {
  const int pairs[][2] = {{0, 0}, {1, 1}, {1, 0}, {2, 2}, {2, 0}};
  for (const auto& [dtype, adapter] : pairs) {
    for (int64_t m : {0, 1, 3, 20, 64, 70})
      for (int64_t d : {1, 31, 40}) adapt(m, d, kNoNorm, kRelu, dtype, adapter, m % 2);
    for (int norm : {kLayerNorm, kRmsNorm})
      for (int64_t d : {1, 16, 77}) adapt(7, d, norm, kTanh, dtype, adapter, true);
    for (int act : {kGelu, kGeluTanh, kSilu, kLeakyRelu}) adapt(5, 33, 0, act, dtype, adapter, true);
    for (int norm : {kNoNorm, kLayerNorm, kRmsNorm}) {
      train(1, 5, 1, norm, dtype, adapter, true);
      train(29, 50, 7, norm, dtype, adapter, true);
      train(150, 101, 65, norm, dtype, adapter, norm != kRmsNorm);
      train(70, 160, 20, norm, dtype, adapter, true);  // whole tiles, and some
    }
    adapt(33, 1300, kLayerNorm, kGelu, dtype, adapter, true);  // several threads
    adapt(64, 1300, kNoNorm, kRelu, dtype, adapter, false);
  }
  if (!refuses_slot(-2, 1) || !refuses_slot(1, 1) || !refuses_slot(0, -1) || refuses_slot(0, 1) ||
      !refuses_slot(0, 9))
    ++failures, std::puts("adapters: bad slots were taken, or a good one was not");
}
