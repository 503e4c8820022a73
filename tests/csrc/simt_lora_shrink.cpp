// lora_shrink.cu on a CPU against sums in fp64. Prints a line a case; exits with 1 where one is off.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "cuda/lora_shrink.cu"
#include "simt_numbers.h"  // after the .cu, whose types it names

namespace {

using namespace fusedpeft::cuda;

struct Case {
  int64_t m, k, r, pad_x, pad_a, skip;  // row strides are k + pad; data starts `skip` elements in
};

// Exactly as many elements as the kernel may touch, on the heap, so that one more is an error.
template <class T>
std::unique_ptr<T[]> matrix(int64_t rows, int64_t cols, int64_t stride, int64_t skip, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int64_t count = rows && cols ? skip + (rows - 1) * stride + cols : skip;
  std::unique_ptr<T[]> made(new T[count]);
  for (int64_t i = 0; i < count; ++i) made[i] = from_float<T>(normal(random));
  return made;
}

template <class X, class A>
bool run(const char* name, int dtype, int adapter_dtype, const Case& c) {
  const int64_t sx = c.k + c.pad_x, sa = c.k + c.pad_a, ss = c.r + 3;
  const auto x = matrix<X>(c.m, c.k, sx, c.skip, 1);
  const auto a = matrix<A>(c.r, c.k, sa, c.skip, 2);
  const float untouched = -12345.0f;
  const int64_t count = c.m && c.r ? (c.m - 1) * ss + c.r : 0;
  std::unique_ptr<float[]> s(new float[count]);
  for (int64_t i = 0; i < count; ++i) s[i] = untouched;
  lora_shrink(x.get() + c.skip, a.get() + c.skip, s.get(), c.m, c.k, c.r, sx, sa, ss, dtype,
              adapter_dtype, nullptr);
  double worst = 0.0;
  bool ok = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i / ss, rank = i % ss;
    if (rank >= c.r) {
      ok &= s[i] == untouched;
      continue;
    }
    double sum = 0.0, size = 0.0;
    for (int64_t k = 0; k < c.k; ++k) {
      const double term = double(to_float(x[c.skip + row * sx + k])) *
                          double(to_float(a[c.skip + rank * sa + k]));
      sum += term;
      size += std::fabs(term);
    }
    const double error = std::fabs(s[i] - sum), bound = 0x1p-23 * size;
    ok &= error <= bound;  // false for NaN
    if (bound > 0.0) worst = std::fmax(worst, error / bound);
  }
  std::printf("%s m=%d k=%d r=%d sx=%d skip=%d: worst %.3f of the bound%s\n", name, int(c.m),
              int(c.k), int(c.r), int(sx), int(c.skip), worst, ok ? "" : " WRONG");
  return ok;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Case& c : {
           Case{1, 2048, 16, 0, 0, 0}, Case{1, 1, 1, 0, 0, 0}, Case{2, 63, 5, 0, 0, 0},
           Case{4, 2049, 3, 0, 0, 0},  // rows that do not start at 16 bytes
           Case{4, 2052, 3, 4, 4, 0},  // rows that do, and a tail
           Case{5, 777, 4, 7, 15, 0}, Case{7, 520, 9, 8, 8, 8}, Case{7, 520, 9, 8, 8, 3},
           Case{9, 0, 2, 0, 0, 0},  // an empty sum is 0
           Case{0, 8, 2, 0, 0, 0}, Case{3, 8, 0, 0, 0, 0}, Case{64, 96, 8, 0, 0, 0},
       }) {
    ok &= run<float, float>("fp32", kFloat32, kFloat32, c);
    ok &= run<__nv_bfloat16, __nv_bfloat16>("bf16", kBFloat16, kBFloat16, c);
    ok &= run<__half, __half>("fp16", kFloat16, kFloat16, c);
    ok &= run<__nv_bfloat16, float>("bf16+fp32", kBFloat16, kFloat32, c);
    ok &= run<__half, float>("fp16+fp32", kFloat16, kFloat32, c);
  }
  return ok ? 0 : 1;
}
