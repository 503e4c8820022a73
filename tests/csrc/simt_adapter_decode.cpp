// Runs csrc/cuda/adapter_decode.cu over csrc/simt against sums in fp64: shared and lone slots, sizes
// from 0 on, all norms and activations, few and many blocks, slots that are not there. Every matrix
// ends where its allocation ends, as does the workspace, and what lies behind an adapter is NaN. After
// each launch the workspace must be as it was; the second launch, with other slots, finds it so.
#include "cuda/adapter_decode.cu"

#include "cpu_matrix.h"

#include <vector>

using fusedpeft::cpu::Matrix;

namespace {

std::unique_ptr<unsigned[]> work;
std::size_t work_words = 0;

struct Case {
  int m, d, most, norm, activation, processors;
  bool weights, own, residual;  // of the norm; whether they are the slots'
  int skip;                     // elements from 16 bytes on to the first of x and of the pool
};

constexpr int kSlots = 6;  // sizes: most, 5, 0, free, 8, 1

double activation_of(int kind, double p) {
  switch (kind) {
    case 0: return std::fmax(p, 0);
    case 1: return p * std::erfc(-p * std::sqrt(0.5)) / 2;
    case 2: return p / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (p + 0.044715 * p * p * p)));
    case 3: return p / (1 + std::exp(-p));
    case 4: return std::tanh(p);
    default: return p > 0 ? p : 0.01 * p;
  }
}

bool run(const char* name, int dtype, int adapter, const Case& c) {
  std::mt19937 random(unsigned(c.m * 31 + c.d + c.most));
  const int gap = c.skip ? 1 : 8;  // rows and slots stay at 16 bytes, or do not
  const int64_t skip = c.skip, rows_of_all = int64_t(c.most) * c.d;
  Matrix x(c.m, c.d + skip, gap, dtype), base(c.m, c.d, 3, dtype), y(c.m, c.d, 0, dtype),
      down(kSlots, rows_of_all + skip, gap, adapter), bias(kSlots, c.most, 1, adapter),
      up(kSlots, rows_of_all + skip, gap, adapter), shift(kSlots, c.d, 5, adapter),
      w(kSlots, c.d + skip, gap, adapter), b(kSlots, c.d + skip, gap, adapter);
  for (Matrix* t : {&x, &base, &y, &down, &bias, &up, &shift, &w, &b}) t->fill(random);
  int32_t size[kSlots] = {c.most, 5, 0, -1, 8, 1};
  const float scale[kSlots] = {0.5f, 2.0f, 3.0f, 1.0f, -0.25f, 1.0f};
  for (int s = 0; s < kSlots; ++s) {
    const int64_t n = size[s] > 0 ? size[s] : 0, stride = (n + 7) / 8 * 8;
    down.poison(s, skip + n * c.d, down.cols), bias.poison(s, n, c.most);
    for (int64_t i = 0; i < stride * c.d; ++i)
      if (i % stride >= n) std::memset(up.at(s, skip + i), 0, up.size());
    up.poison(s, skip + stride * c.d, up.cols);
  }
  std::unique_ptr<int32_t[]> slots(new int32_t[c.m]);
  const bool layer = c.norm == 1;
  const float eps = 0.01f;
  double worst = 0.0;
  bool ok = true;
  for (int launch = 0; launch < 2; ++launch) {
    for (int i = 0; i < c.m; ++i) {
      constexpr int32_t seen[] = {0, 1, -1, 2, 0, 3, 4, 0, kSlots, 0, 5, -2};
      slots[i] = c.m < 4 ? launch : seen[(launch ? random() : unsigned(i)) % 12];
    }
    size[3] = launch ? c.most + 1 : -1;  // neither holds an adapter
    y.fill(random);
    fusedpeft::cuda::adapter_decode(
        {x.at(0, skip), c.residual ? base.at(0, 0) : nullptr, y.at(0, 0), slots.get(), size, scale,
         down.at(0, skip), bias.at(0, 0), up.at(0, skip), shift.at(0, 0),
         c.weights ? w.at(0, skip) : nullptr, c.weights && layer ? b.at(0, skip) : nullptr, kSlots,
         c.m, c.d, c.most, x.stride, base.stride, down.stride, bias.stride, up.stride, shift.stride,
         c.own ? w.stride : 0, c.own ? b.stride : 0, eps, c.norm, c.activation, dtype, adapter,
         c.processors},
        nullptr);
    for (std::size_t i = 0; i < work_words; ++i) ok &= work[i] == ~0u;
    for (int i = 0; i < c.m; ++i) {
      const int s = slots[i], lost = s < -1 || s >= kSlots || s == 3;
      const int n = lost || s < 0 ? 0 : size[s], of = c.own ? s : 0;
      double mean = 0, square = 0;
      std::vector<double> v(c.d), h(n), rough(n);
      for (int j = 0; j < c.d; ++j) mean += layer ? x(i, skip + j) / c.d : 0;
      for (int j = 0; j < c.d; ++j) v[j] = x(i, skip + j) - mean, square += v[j] * v[j] / c.d;
      for (int j = 0; n && c.norm && j < c.d; ++j) {
        v[j] = v[j] / std::sqrt(square + eps) * (c.weights ? w(of, skip + j) : 1);
        if (layer && c.weights) v[j] += b(of, skip + j);
      }
      for (int r = 0; r < n; ++r) {
        double p = bias(s, r);
        for (int j = 0; j < c.d; ++j) {
          const double term = v[j] * down(s, skip + int64_t(r) * c.d + j);
          p += term, rough[r] += std::fabs(term);
        }
        h[r] = activation_of(c.activation, p);
      }
      for (int j = 0; j < c.d; ++j) {
        double want = n ? scale[s] * shift(s, j) : 0, all = std::fabs(want);
        for (int r = 0; r < n; ++r) {
          const double u = scale[s] * up(s, skip + int64_t(j) * ((n + 7) / 8 * 8) + r);
          want += h[r] * u, all += std::fabs(u) * (std::fabs(h[r]) + rough[r]);
        }
        if (c.residual) want += base(i, j), all += std::fabs(base(i, j));
        if (lost) {
          ok &= std::isnan(y(i, j));
          continue;
        }
        const double step = fusedpeft::cpu::step_of(dtype);
        const double error = std::fabs(y(i, j) - want), bound = step * std::fabs(want) + 4e-7 * all;
        ok &= error <= bound;  // false for NaN
        if (bound > 0.0) worst = std::fmax(worst, error / bound);
      }
    }
  }
  std::printf("%s m=%d d=%d most=%d norm=%d act=%d processors=%d skip=%d: worst %.3f of the bound%s\n",
              name, c.m, c.d, c.most, c.norm, c.activation, c.processors, c.skip, worst,
              ok ? "" : " WRONG");
  return ok;
}

}  // namespace

unsigned* fusedpeft::cuda::workspace(std::size_t words, cudaStream_t, unsigned char) {
  if (words != work_words) {  // exactly so many, so that what lies beyond is seen
    work.reset(new unsigned[words]);
    work_words = words;
    for (std::size_t i = 0; i < words; ++i) work[i] = ~0u;
  }
  return work.get();
}

int main(int argc, char**) {
  const bool all = argc == 1;  // dtypes; else fp32
  for (const Case& c : {
           Case{1, 264, 16, 0, 0, 20, false, false, true, 0},  // a row of D a block
           Case{1, 1, 8, 1, 1, 2, true, true, false, 0},
           Case{3, 2200, 8, 1, 4, 3, true, false, true, 0},     // more than a step of a block
           Case{12, 136, 24, 2, 1, 9, true, true, true, 0},     // every kind of slot
           Case{13, 77, 16, 1, 2, 12, true, true, true, 0},     // rows that do not start at 16 bytes
           Case{12, 96, 40, 1, 3, 24, false, false, false, 0},  // statistics alone
           Case{30, 40, 8, 0, 5, 4, false, false, true, 0},     // more units than blocks
           Case{5, 72, 16, 2, 0, 7, true, false, true, 3},
           Case{70, 16, 8, 0, 0, 5, false, false, true, 0},     // more than a warp of tokens
           Case{4, 24, 296, 0, 1, 8, false, false, true, 0},    // a row of U is more than a warp's
       }) {
    if (!run("fp32", 0, 0, c)) return 1;
    if (!all) continue;
    if (!run("bf16", 1, 1, c) || !run("fp16", 2, 2, c)) return 1;
    if (!run("bf16+fp32", 1, 0, c) || !run("fp16+fp32", 2, 0, c)) return 1;
  }
}
