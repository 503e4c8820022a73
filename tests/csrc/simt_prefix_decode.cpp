// prefix_decode.cu on a CPU against sums in fp64. Prints a line a case; exits with 1 where one is off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cuda/prefix_decode.cu"
#include "simt_numbers.h"  // after the .cu, whose types it names

namespace {

using namespace fusedpeft::cuda;

struct Case {
  int b, h, hkv, t, s, d, p, block, window, prefix_splits, splits, skip;  // block 0: dense
};

// [rows, d] at a stride of d + pad, exactly as long as the kernel may read, `skip` elements in.
template <class T>
struct Matrix {
  int64_t stride, skip;
  std::unique_ptr<T[]> data;
  Matrix(int64_t rows, int64_t d, int64_t pad, int64_t skip, int seed) : stride(d + pad), skip(skip) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int64_t count = skip + (rows ? (rows - 1) * stride + d : 0);
    data.reset(new T[count]);
    for (int64_t i = 0; i < count; ++i) data[i] = from_float<T>(normal(random));
  }
  T* begin() const { return data.get() + skip; }
  double operator()(int64_t row, int64_t col) const { return to_float(begin()[row * stride + col]); }
  PrefixDecode::Keys keys(int64_t heads, int64_t tokens) const {
    return {begin(), heads * tokens * stride, tokens * stride, stride};
  }
};

template <class T>
bool run(const char* name, int dtype, const Case& c) {
  const int slots = 4, blocks = c.block ? (c.s + c.block - 1) / c.block : 0;
  const int tokens = c.block ? c.block : c.s, outer = c.block ? c.b * blocks : c.b;
  const int64_t queries = int64_t(c.b) * c.h * c.t;
  const Matrix<T> q(queries, c.d, 0, c.skip, 1), out(queries, c.d, 0, c.skip, 2);
  const Matrix<T> k(int64_t(outer) * c.hkv * tokens, c.d, 8, c.skip, 3);
  const Matrix<T> v(int64_t(outer) * c.hkv * tokens, c.d, 16, c.skip, 4);
  const Matrix<T> pk(slots * c.hkv * c.p, c.d, 8, c.skip, 5), pv(slots * c.hkv * c.p, c.d, 0, c.skip, 6);
  std::mt19937 random(c.b + c.s);
  // Slot 3 is free, slot 5 is not there, a length is beyond s, a block is not there.
  const std::vector<int> held = {c.p, 0, c.p / 2, -1};
  std::vector<int> slot(c.b), length(c.b), table(c.b * blocks);
  for (int i = 0; i < c.b; ++i) {
    slot[i] = i % 7 == 6 ? (i % 2 ? 3 : 5) : int(random() % 4) - 1;
    length[i] = i % 9 == 8 ? c.s + 1 : int(random() % (c.s + 1));
  }
  for (size_t i = 0; i < table.size(); ++i) table[i] = int(table.size() - 1 - i);
  if (blocks && c.b > 5) table[5 * blocks] = outer, length[5] = c.s;
  const int64_t work = queries * (c.prefix_splits + c.splits) * (c.d + 2);
  std::unique_ptr<float[]> lse(new float[queries]), records(new float[work]);
  std::fill_n(records.get(), work, NAN);
  prefix_decode({q.begin(), k.keys(c.hkv, tokens), v.keys(c.hkv, tokens), pk.keys(c.hkv, c.p),
                 pv.keys(c.hkv, c.p), slot.data(), held.data(), length.data(),
                 blocks ? table.data() : nullptr, out.begin(), lse.get(), records.get(), c.b, c.h,
                 c.hkv, c.t, c.s, c.d, slots, c.p, blocks, c.block, outer, c.prefix_splits, c.splits,
                 0.2f, c.window, dtype},
                nullptr);
  // A score is a sum of d products in fp32, and e to the power of it.
  const double step = dtype == kFloat32    ? 0x1p-20 * (1 + c.d / 64.0)
                      : dtype == kBFloat16 ? 0x1p-8
                                           : 0x1p-11;
  double worst = 0.0;
  bool ok = true;
  for (int64_t row = 0; row < queries; ++row) {
    const int r = int(row / c.t / c.h), i = int(row / c.t % c.h), at = length[r] - c.t + int(row % c.t);
    const int head = i / (c.h / c.hkv);
    const bool no_block = blocks && r == 5;  // the window may have gone past it
    if (slot[r] == 5 || slot[r] == 3 || length[r] > c.s || no_block) {
      ok &= (no_block && c.window) ||
            (std::isnan(lse[row]) && std::isnan(out(row, 0)) && std::isnan(out(row, c.d - 1)));
      continue;
    }
    std::vector<double> weight;
    std::vector<int64_t> where;
    const auto see = [&](const Matrix<T>& m, int64_t key) {
      double score = 0.0;
      for (int j = 0; j < c.d; ++j) score += double(0.2f) * q(row, j) * m(key, j);
      weight.push_back(score), where.push_back(key);
    };
    const int of_prefix = slot[r] < 0 ? 0 : held[slot[r]];
    for (int j = 0; j < of_prefix; ++j) see(pk, (int64_t(slot[r]) * c.hkv + head) * c.p + j);
    for (int j = c.window ? std::max(0, at - c.window + 1) : 0; j <= at; ++j) {
      const int64_t o = blocks ? table[r * blocks + j / c.block] : r;
      see(k, (o * c.hkv + head) * tokens + (blocks ? j % c.block : j));
    }
    double top = -INFINITY, total = 0.0;
    for (double w : weight) top = std::max(top, w);
    for (double& w : weight) total += w = std::exp(w - top);
    if (weight.empty()) {
      ok &= lse[row] == -INFINITY && out(row, 0) == 0.0 && out(row, c.d - 1) == 0.0;
      continue;
    }
    ok &= std::fabs(lse[row] - (top + std::log(total))) <= 1e-5 * (1.0 + std::fabs(top));
    for (int j = 0; j < c.d; ++j) {
      double want = 0.0, size = 0.0;
      for (size_t n = 0; n < weight.size(); ++n) {
        const double term = weight[n] / total * (int64_t(n) < of_prefix ? pv : v)(where[n], j);
        want += term, size += std::fabs(term);
      }
      const double error = std::fabs(out(row, j) - want), bound = step * (std::fabs(want) + size);
      ok &= error <= bound;  // false for NaN
      if (bound > 0.0) worst = std::fmax(worst, error / bound);
    }
  }
  std::printf("%s b=%d h=%d/%d t=%d s=%d d=%d p=%d block=%d window=%d: worst %.3f of the bound%s\n",
              name, c.b, c.h, c.hkv, c.t, c.s, c.d, c.p, c.block, c.window, worst, ok ? "" : " WRONG");
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : {
           Case{1, 1, 1, 1, 1, 8, 1, 0, 0, 1, 1, 0},
           Case{9, 4, 2, 1, 150, 64, 70, 0, 0, 1, 2, 0},    // several splits, ragged tiles
           Case{20, 8, 1, 1, 40, 128, 200, 0, 0, 2, 1, 0},  // more sharers than a unit takes
           Case{8, 2, 2, 1, 130, 40, 20, 16, 0, 1, 3, 0},   // blocks; d below a tile's
           Case{7, 4, 1, 8, 90, 32, 30, 7, 25, 1, 2, 0},    // 32 queries a request, a window
           Case{3, 2, 1, 2, 70, 256, 66, 0, 0, 2, 1, 0},
           Case{4, 6, 2, 3, 33, 33, 17, 0, 9, 1, 1, 1},     // neither aligned nor whole pieces
           Case{2, 2, 1, 2, 5, 16, 0, 0, 0, 1, 1, 0},
       }) {
    ok &= run<float>("fp32", kFloat32, c);
    ok &= run<__nv_bfloat16>("bf16", kBFloat16, c);
    ok &= run<__half>("fp16", kFloat16, c);
  }
  return ok ? 0 : 1;
}
