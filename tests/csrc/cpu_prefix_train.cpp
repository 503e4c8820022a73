// prefix_train of csrc/cpu against double: ragged sizes, rows that share prefixes or have none,
// windows, masks; what lies between the rows of a tensor is NaN.
#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "cpu_matrix.h"

using namespace fusedpeft::cpu;

namespace {

struct TrainCase {
  int64_t b, h, hkv, t, s, p, d, window;
  bool causal, mask;
};
using Doubles = std::vector<double>;

void compare(const char* what, const TrainCase& c, int dtype, const Doubles& want, const Doubles& got) {
  double most = 1e-3;
  for (double w : want)
    if (std::isfinite(w)) most = std::max(most, std::fabs(w));
  const double far = most * (dtype == kFloat32 ? 2e-5 : dtype == kBFloat16 ? 0.02 : 0.003);
  for (size_t i = 0; i < want.size(); ++i)
    if (!(want[i] == got[i] || std::fabs(want[i] - got[i]) <= far) && failures++ < 5)
      std::printf("prefix_train b %ld h %ld/%ld t %ld s %ld p %ld d %ld dtype %d: %s[%ld] expected %g, "
                  "got %g\n", c.b, c.h, c.hkv, c.t, c.s, c.p, c.d, dtype, what, i, want[i], got[i]);
}

Doubles of(const Matrix& m) {
  Doubles all;
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) all.push_back(m(i, j));
  return all;
}

void run(const TrainCase& c, int dtype) {
  std::mt19937 random(static_cast<unsigned>(c.t + 3 * c.s + 7 * c.d + 11 * c.p));
  const int64_t prefixes = 2, queries = c.b * c.h * c.t, keys = c.b * c.hkv * c.s;
  Matrix q(queries, c.d, 1, dtype), out(queries, c.d, 0, dtype), dout(queries, c.d, 2, dtype);
  Matrix dq(queries, c.d, 0, dtype), k(keys, c.d, 3, dtype), v(keys, c.d, 0, dtype);
  Matrix dk(keys, c.d, 0, dtype), dv(keys, c.d, 5, dtype), mask(c.t, c.s, 1, kFloat32);
  const int64_t of_prefix = prefixes * c.hkv * c.p;
  Matrix pk(of_prefix, c.d, 2, dtype), pv(of_prefix, c.d, 0, dtype);
  for (Matrix* m : {&q, &out, &dout, &dq, &k, &v, &dk, &dv, &mask, &pk, &pv}) m->fill(random);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < c.b; ++i) ids.push_back(c.p ? i % 3 - 1 : -1);
  std::vector<float> lse(queries), dlse(queries), dpk(of_prefix * c.d), dpv(of_prefix * c.d);
  for (float& one : dlse) one = static_cast<float>(random() % 5) - 2;
  const auto place = [](const Matrix& m, int64_t heads, int64_t tokens) {
    return Keys{m.bytes.get(), heads * tokens * m.stride, tokens * m.stride, m.stride};
  };
  const int64_t threads = 3;
  std::vector<float> work(threads * prefix_train_floats(c.p, c.s, c.d, true));
  PrefixTrain call = {};
  call.q = place(q, c.h, c.t), call.out = place(out, c.h, c.t);
  call.k = place(k, c.hkv, c.s), call.v = place(v, c.hkv, c.s);
  call.pk = place(pk, c.hkv, c.p), call.pv = place(pv, c.hkv, c.p);
  call.ids = ids.data(), call.lse = lse.data(), call.work = work.data(), call.threads = threads;
  if (c.mask) call.mask = reinterpret_cast<float*>(mask.bytes.get()), call.mask_t = mask.stride;
  call.b = c.b, call.h = c.h, call.hkv = c.hkv, call.t = c.t, call.s = c.s, call.p = c.p, call.d = c.d;
  call.window = c.window, call.causal = c.causal, call.scale = 0.25f, call.dtype = dtype;
  prefix_train(call);
  call.dout = place(dout, c.h, c.t), call.dq = place(dq, c.h, c.t);
  call.dk = place(dk, c.hkv, c.s), call.dv = place(dv, c.hkv, c.s);
  call.dlse = dlse.data(), call.dpk = dpk.data(), call.dpv = dpv.data();
  prefix_train(call);

  Doubles want_out(queries * c.d), want_lse(queries), want_dq(queries * c.d), want_dk(keys * c.d),
      want_dv(keys * c.d), want_dpk(of_prefix * c.d), want_dpv(of_prefix * c.d);
  for (int64_t row = 0; row < queries; ++row) {
    const int64_t r = row / c.t / c.h, head = row / c.t % c.h / (c.h / c.hkv), t = row % c.t;
    struct Seen {
      const Matrix *k, *v;
      Doubles *dk, *dv;
      int64_t at;
      double score;
    };
    std::vector<Seen> seen;
    for (int64_t j = 0; ids[r] >= 0 && j < c.p; ++j)
      seen.push_back({&pk, &pv, &want_dpk, &want_dpv, (ids[r] * c.hkv + head) * c.p + j, 0});
    for (int64_t j = 0; j < c.s; ++j) {
      const int64_t after = j - (c.s - c.t + t);
      if ((c.causal && after > 0) || (c.window && std::abs(after) >= c.window)) continue;
      seen.push_back({&k, &v, &want_dk, &want_dv, (r * c.hkv + head) * c.s + j, c.mask ? mask(t, j) : 0});
    }
    double top = -INFINITY, total = 0, delta = -dlse[row];
    for (Seen& one : seen) {
      for (int64_t j = 0; j < c.d; ++j) one.score += 0.25 * q(row, j) * (*one.k)(one.at, j);
      top = std::max(top, one.score);
    }
    for (Seen& one : seen) total += one.score = std::exp(one.score - top);
    want_lse[row] = seen.empty() ? -INFINITY : top + std::log(total);
    for (Seen& one : seen)
      for (int64_t j = 0; j < c.d; ++j) {
        const double term = one.score / total * (*one.v)(one.at, j);
        want_out[row * c.d + j] += term, delta += term * dout(row, j);
      }
    for (Seen& one : seen) {
      double dp = 0;
      const double p = one.score / total;
      for (int64_t j = 0; j < c.d; ++j) dp += dout(row, j) * (*one.v)(one.at, j);
      const double ds = 0.25 * p * (dp - delta);
      for (int64_t j = 0; j < c.d; ++j) {
        want_dq[row * c.d + j] += ds * (*one.k)(one.at, j);
        (*one.dk)[one.at * c.d + j] += ds * q(row, j);
        (*one.dv)[one.at * c.d + j] += p * dout(row, j);
      }
    }
  }
  compare("out", c, dtype, want_out, of(out));
  compare("lse", c, kFloat32, want_lse, Doubles(lse.begin(), lse.end()));
  compare("dq", c, dtype, want_dq, of(dq));
  compare("dk", c, dtype, want_dk, of(dk));
  compare("dv", c, dtype, want_dv, of(dv));
  compare("dpk", c, dtype, want_dpk, Doubles(dpk.begin(), dpk.end()));
  compare("dpv", c, dtype, want_dpv, Doubles(dpv.begin(), dpv.end()));
}

bool refuses(void (*spoil)(PrefixTrain&), const char* message) {
  PrefixTrain call = {};
  call.b = call.h = call.hkv = call.t = call.s = call.d = call.threads = 1;
  spoil(call);
  try {
    prefix_train(call);
  } catch (const std::exception& e) {
    return std::string(e.what()).find(message) != std::string::npos;
  }
  return false;
}

}  // namespace

void prefix_train_checks() {
  for (int dtype : {0, 1, 2}) {
    for (int64_t d : {1, 17, 64})
      for (const TrainCase& c : {TrainCase{3, 4, 2, 50, 50, 13, d, 0, true, false},
                                 TrainCase{2, 2, 2, 7, 61, 0, d, 0, false, true},
                                 TrainCase{1, 2, 1, 49, 97, 49, d, 9, true, true},
                                 TrainCase{4, 3, 3, 1, 5, 96, d, 3, false, false}})
        run(c, dtype);
    run({1, 2, 2, 20, 30, 5, 256, 0, true, false}, dtype);
  }
  if (!refuses([](PrefixTrain& a) { a.dtype = 3; }, "dtype") ||
      !refuses([](PrefixTrain& a) { a.t = 2; }, "s >= t") ||
      !refuses([](PrefixTrain& a) { a.hkv = 2; }, "multiple of hkv") ||
      !refuses([](PrefixTrain& a) { a.d = 0; }, "d: expected >= 1") ||
      !refuses([](PrefixTrain& a) { a.threads = 0; }, "threads: expected >= 1"))
    ++failures, std::puts("bad arguments of prefix_train were taken");
}
