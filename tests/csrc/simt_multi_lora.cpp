// multi_lora.cu on a CPU against sums in fp64, each case twice over the same flags with other slots and
// K in splits; where nothing is stacked also with one adapter for all tokens.
// Prints a line a case; exits with 1 where one is off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cuda/multi_lora.cu"
#include "simt_numbers.h"  // after the .cu, whose types it names

namespace {

using namespace fusedpeft::cuda;

unsigned flags[3];  // exactly as many as the kernel may touch

struct Case {
  int m, k;
  std::vector<int> sizes;
  int max_rank, pad, skip;  // more elements between rows, before the first
};

// [rows, cols] at a stride of cols + pad, exactly as long as the kernel may read, `skip` elements in.
template <class T>
struct Matrix {
  int64_t stride, skip;
  std::unique_ptr<T[]> data;
  Matrix(int64_t rows, int64_t cols, int64_t pad, int64_t skip, int seed, float size = 1.0f)
      : stride(cols + pad), skip(skip) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int64_t count = skip + (rows ? (rows - 1) * stride + cols : 0);
    data.reset(new T[count]);
    for (int64_t i = 0; i < count; ++i) data[i] = from_float<T>(size * normal(random));
  }
  T* begin() const { return data.get() + skip; }
  double operator()(int64_t row, int64_t col) const { return to_float(begin()[row * stride + col]); }
};

constexpr int kSlots = 6;  // the last one is free, the first part of the one before has rank 0
constexpr int kProcessors = 5;

template <class T, class P>
bool run(const char* name, int dtype, int adapter_dtype, const Case& c) {
  const int parts = int(c.sizes.size());
  int64_t n = 0;
  for (int size : c.sizes) n += size;
  const Matrix<T> x(c.m, c.k, c.pad, c.skip, 1), w(n, c.k, c.pad, c.skip, 2), bias(1, n, 0, 0, 3);
  const Matrix<T> y(c.m, n, 0, 0, 4);
  Matrix<P> a(kSlots, int64_t(parts) * c.max_rank * c.k, c.pad, c.skip, 5);
  Matrix<P> b(kSlots, n * c.max_rank, c.pad, c.skip, 6);
  std::vector<int> rank(kSlots * parts), slots(c.m);
  std::vector<float> scale(kSlots * parts);
  std::mt19937 random(c.m + c.k);
  for (int slot = 0; slot < kSlots; ++slot) {
    int64_t at = 0;
    for (int part = 0; part < parts; ++part) {
      int& r = rank[slot * parts + part];
      r = slot == kSlots - 1 ? -1 : slot == kSlots - 2 && part == 0 ? 0 : 1 + random() % c.max_rank;
      scale[slot * parts + part] = 0.5f + 0.25f * slot;
      const int length = (std::max(r, 0) + 7) / 8 * 8;
      for (int row = 0; row < c.sizes[part]; ++row)  // rows of B end in zeros
        for (int col = r; r > 0 && col < length; ++col)
          b.begin()[slot * b.stride + at + row * length + col] = from_float<P>(0.0f);
      at += int64_t(c.sizes[part]) * c.max_rank;
      // What lies behind an adapter is never looked at.
      P* rest = a.begin() + slot * a.stride + int64_t(part) * c.max_rank * c.k;
      for (int64_t i = int64_t(std::max(r, 0)) * c.k; i < int64_t(c.max_rank) * c.k; ++i)
        rest[i] = from_float<P>(NAN);
    }
  }
  std::unique_ptr<float[]> sums(new float[2 * c.m * n]);
  std::unique_ptr<float[]> s(new float[int64_t(c.m) * parts * c.max_rank]);
  MultiLora call = {x.begin(), w.begin(), bias.begin(), y.begin(), slots.data(), a.begin(), b.begin(),
                    rank.data(), scale.data(), s.get(), sums.get(), {}, n, x.stride, w.stride, a.stride,
                    c.k, b.stride, c.m, c.k, kSlots, parts, c.max_rank, kProcessors, 1, dtype,
                    adapter_dtype, 0.75f};
  std::copy(c.sizes.begin(), c.sizes.end(), call.sizes);

  const double step = dtype == kFloat32 ? 0.0 : dtype == kBFloat16 ? 0x1p-8 : 0x1p-11;
  double worst = 0.0;
  bool ok = true;
  for (int replay = 0; replay < (parts == 1 ? 3 : 2); ++replay) {
    for (int i = 0; i < c.m; ++i) slots[i] = int(random() % (kSlots + 2)) - 1;  // -1 to one too many
    if (c.m > 3) slots[replay] = kSlots - 1, slots[2] = -7;
    if (replay == 2) {  // what null stands for: slot 0, of max_rank and one_scale
      std::fill(slots.begin(), slots.end(), 0);
      for (int64_t i = int64_t(rank[0]) * c.k; i < int64_t(c.max_rank) * c.k; ++i)
        a.begin()[i] = from_float<P>(0.5f);
      rank[0] = c.max_rank, scale[0] = call.one_scale;
      call.slots = call.rank = nullptr, call.scale = nullptr, call.count = 1;
    }
    std::fill_n(s.get(), int64_t(c.m) * parts * c.max_rank, NAN);
    std::fill_n(sums.get(), 2 * c.m * n, NAN);
    call.splits = replay == 1 ? 3 : 1;
    multi_lora(call, nullptr);
    ok &= flags[0] == 0 && flags[1] == 0 && flags[2] == 0;
    for (int token = 0; token < c.m; ++token) {
      const int slot = slots[token];
      const bool lost = slot < -1 || slot >= kSlots - 1;
      int64_t row = 0, at = 0;
      for (int part = 0; part < parts; ++part) {
        const int r = lost || slot < 0 ? 0 : rank[slot * parts + part], length = (r + 7) / 8 * 8;
        std::vector<double> down(r), size(r);
        for (int i = 0; i < r; ++i)
          for (int k = 0; k < c.k; ++k) {
            const double term =
                x(token, k) * to_float(a.begin()[slot * a.stride + (part * c.max_rank + i) * c.k + k]);
            down[i] += term, size[i] += std::fabs(term);
          }
        for (int i = 0; i < c.sizes[part]; ++i, ++row) {
          const double got = y(token, row);
          if (lost) {
            ok &= std::isnan(got);
            continue;
          }
          double want = bias(0, row), sum = std::fabs(want);
          for (int k = 0; k < c.k; ++k) want += x(token, k) * w(row, k), sum += std::fabs(x(token, k) * w(row, k));
          for (int j = 0; j < r; ++j) {
            const double up = scale[slot * parts + part] *
                              to_float(b.begin()[slot * b.stride + at + int64_t(i) * length + j]);
            want += up * down[j], sum += std::fabs(up) * size[j];
          }
          // fp32 sums of products that are exact in it, rounded once to T.
          const double bound = step * std::fabs(want) + 0x1p-22 * sum;
          const double error = std::fabs(got - want);
          ok &= error <= bound;  // false for NaN
          worst = std::fmax(worst, error / bound);
        }
        at += int64_t(c.sizes[part]) * c.max_rank;
      }
    }
  }
  std::printf("%s m=%d k=%d n=%d parts=%d max_rank=%d: worst %.3f of the bound%s\n", name, c.m, c.k,
              int(n), parts, c.max_rank, worst, ok ? "" : " WRONG");
  return ok;
}

}  // namespace

unsigned* fusedpeft::cuda::workspace(std::size_t, cudaStream_t, unsigned char) { return flags; }

// Arguments: this dtype alone; so many cases.
int main(int argc, char** argv) {
  bool ok = true;
  const auto wanted = [&](const char* name) { return argc < 2 || !std::strcmp(argv[1], name); };
  int left = argc < 3 ? 8 : std::atoi(argv[2]);
  for (const Case& c : {
           Case{1, 8, {1}, 8, 0, 0},
           Case{1, 648, {33}, 16, 0, 0},          // several steps of K, the last ragged
           Case{8, 72, {17, 7, 3}, 16, 8, 8},     // stacked, rows farther apart than K
           Case{11, 0, {9}, 8, 8, 0},
           Case{5, 37, {9, 3}, 8, 1, 1},          // neither aligned nor whole pieces
           Case{13, 72, {20}, 8, 0, 0},           // two groups of tokens
           Case{31, 136, {35, 5}, 8, 0, 0},       // four
           Case{64, 72, {70}, 8, 0, 0},           // eight
       }) {
    if (left-- == 0) break;
    if (c.m <= 13 && wanted("fp32")) ok &= run<float, float>("fp32", kFloat32, kFloat32, c);
    if (wanted("bf16")) ok &= run<__nv_bfloat16, __nv_bfloat16>("bf16", kBFloat16, kBFloat16, c);
    if (c.m <= 8 && wanted("bf16")) ok &= run<__nv_bfloat16, float>("bf16+fp32", kBFloat16, kFloat32, c);
    if (wanted("fp16")) ok &= run<__half, __half>("fp16", kFloat16, kFloat16, c);
  }
  return ok ? 0 : 1;
}
