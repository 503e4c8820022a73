// adapter_train.h in bf16 on a unit that multiplies tiles (AMX): the same y, P and gradients, in the
// same two passes backward; what is multiplied is bf16, what is added fp32.
//
// x and dy are left sides as they lie in memory, with a norm as well: of a row with mean u and
// 1 / deviation r, D' = D * w, g = D''s rows' sums, the sums being those of exact products,
//   P = r (x D'^T - u g) + c + D b,   dD = w * (Q^T x - (Q^T u) 1^T) + dc b^T,   Q = r dP.
// By columns they are right sides, their rows interleaved in pairs; h and Q become left sides of these
// products by rows, a tile each 32 rows. Numbers behind E stay zero, also where x is not finite.
//
// Included as tiles.h says, and with tiles_begin and tiles_end of multi_lora_tiles.h defined.
#pragma once

#include "tiles.h"

namespace fusedpeft::cpu {
namespace {

constexpr int64_t kUnit = 2 * kSide;  // columns of d whose sums are held at once
constexpr int64_t kUnits = 4;         // read at once by columns: a few lines in a row
constexpr int64_t kSteps = 8;         // of kDeep rows, whose share of those is added at a time
constexpr int64_t kAhead = 32;        // rows by which they are fetched before their turn

// A layout of memory: where the next `bytes` lie.
struct Carve {
  int64_t size = 0;
  int64_t operator()(int64_t bytes) {
    const int64_t here = size;
    size += round_up(bytes, kLine);
    return here;
  }
};

struct TileTrain {
  const AdapterTrain& a;
  const bool backward;
  const int64_t dp, ep, tiles, blocks;  // d and E rounded up to kDeep; of E; of kDeep rows
  const BFloat16 *x, *y;                // y: the residual, backward dy
  Right first, second;                  // x D'^T (dy U), h U^T (Q D')
  float *c, *g, *e;                     // c + D b; the sums of D''s rows; scale e
  float* of_blocks;                     // [blocks, 2, ep]: sums of dP and of Q u over a block's rows
  // A thread's memory, by rows: a block of x, h or Q, sums [kDeep, ep], sums [kDeep, kUnit]
  char* own;
  int64_t block, narrowed, sums, part, own_size;
  int64_t units, totals, panel;  // by columns: sums of kUnits units; [2, ep]; a panel's pairs

  explicit TileTrain(const AdapterTrain& a)
      : a(a),
        backward(a.dy != nullptr),
        dp(round_up(a.d, kDeep)),
        ep(round_up(a.e, kDeep)),
        tiles(ceil_div(a.e, kSide)),
        blocks(ceil_div(a.m, kDeep)),
        x(static_cast<const BFloat16*>(a.x)),
        y(static_cast<const BFloat16*>(backward ? a.dy : a.residual)) {}

  void allocate(int64_t threads) {
    Carve rows, columns, all;
    block = rows(kDeep * (dp < ep ? ep : dp) * 2);
    narrowed = rows(kDeep * ep * 2);
    sums = rows(kDeep * ep * 4);
    part = rows(kDeep * kUnit * 4);
    units = columns(kUnits * unit_size() * 4);
    totals = columns(2 * ep * 4);
    panel = columns(kUnits * 2 * kSteps * kTileWords * 4);
    own_size = rows.size < columns.size ? columns.size : rows.size;
    const int64_t at[] = {all(dp * ep * 2), all(dp * ep * 2), all(ep * 4), all(ep * 4), all(dp * 4),
                          all(backward ? blocks * 2 * ep * 4 : 0), all(threads * own_size)};
    char* memory = static_cast<char*>(scratch(all.size));
    first = {reinterpret_cast<uint32_t*>(memory + at[0]), dp / kDeep};
    second = {reinterpret_cast<uint32_t*>(memory + at[1]), ep / kDeep};
    c = reinterpret_cast<float*>(memory + at[2]);
    g = reinterpret_cast<float*>(memory + at[3]);
    e = reinterpret_cast<float*>(memory + at[4]);
    of_blocks = reinterpret_cast<float*>(memory + at[5]);
    own = memory + at[6];
  }

  template <class T>
  T* mine(int64_t thread, int64_t where) const {
    return reinterpret_cast<T*>(own + thread * own_size + where);
  }
  int64_t unit_size() const { return tiles * kSide * kUnit; }
  static const BFloat16* of(const void* p) { return static_cast<const BFloat16*>(p); }
  static BFloat16* of(void* p) { return static_cast<BFloat16*>(p); }

  // --- weights ---

  // Right sides out of kDeep rows of a matrix, padded: the rows as columns n, or as its steps k.
  static void across(const BFloat16* rows, int64_t width, int64_t i, const Right& to) {
    for (int64_t n = 0; n < kDeep / kSide; ++n)
      for (int64_t k = 0; k < width / kDeep; ++k) {
        U v[kSide];
        for (int64_t r = 0; r < kSide; ++r)
          v[r] = *reinterpret_cast<const UnalignedU*>(rows + (n * kSide + r) * width + k * kDeep);
        transpose(v);
        for (int64_t r = 0; r < kSide; ++r) put(v[r], to.tile(i * 2 + n, k) + r * kSide);
      }
  }
  static void along(const BFloat16* rows, int64_t width, int64_t i, const Right& to) {
    for (int64_t n = 0; n < width / kSide; ++n)
      for (int64_t p = 0; p < kSide; ++p) {
        const BFloat16* from = rows + 2 * p * width + n * kSide;
        put(pairs(halves(from), halves(from + width)), to.tile(n, i) + p * kSide);
      }
  }

  void pack(int64_t thread, int64_t team) const {
    auto* rows = mine<BFloat16>(thread, block);
    const BFloat16 *w = of(a.norm_weight), *b = of(a.norm_bias);
    for (int64_t i = ep / kDeep * thread / team; i < ep / kDeep * (thread + 1) / team; ++i) {
      for (int64_t r = 0; r < kDeep; ++r) {
        const int64_t row = i * kDeep + r;
        F of_bias = {}, total = {};
        for (int64_t j = 0; j < dp; j += kSide) {
          Half v = halves(of(a.down) + row * a.d + j, row < a.e ? a.d - j : 0);
          if (b) of_bias = fma(widened(v), widened(halves(b + j, a.d - j)), of_bias);
          if (w) v = narrow(widened(v) * widened(halves(w + j, a.d - j)));
          total += widened(v);
          put(v, rows + r * dp + j);
        }
        g[row] = sum(total);
        c[row] = sum(of_bias) + (a.down_bias && row < a.e ? to_float(of(a.down_bias)[row]) : 0.0f);
      }
      if (backward) {
        along(rows, dp, i, second);
      } else {
        across(rows, dp, i, first);
      }
    }
    for (int64_t i = dp / kDeep * thread / team; i < dp / kDeep * (thread + 1) / team; ++i) {
      for (int64_t r = 0; r < kDeep; ++r) {
        const int64_t row = i * kDeep + r;
        for (int64_t j = 0; j < ep; j += kSide)
          put(halves(of(a.up) + row * a.e + j, row < a.d ? a.e - j : 0), rows + r * ep + j);
        e[row] = a.up_bias && row < a.d ? a.scale * to_float(of(a.up_bias)[row]) : 0.0f;
      }
      if (backward) {
        along(rows, ep, i, first);
      } else {
        across(rows, ep, i, second);
      }
    }
  }

  // --- by rows ---

  // Calls work(its number) for a thread's blocks of rows.
  template <class Work>
  void each_block(int64_t thread, int64_t team, Work work) const {
    for (int64_t i = blocks * thread / team; i < blocks * (thread + 1) / team; ++i) work(i);
  }

  // kDeep rows from m on, where they lie or, if that is not whole tiles, in `copy`; their distance.
  const BFloat16* left(const BFloat16* from, int64_t m, BFloat16* copy, int64_t* stride) const {
    *stride = dp;
    if (m + kDeep <= a.m && dp == a.d) return from + m * a.d;
    for (int64_t r = 0; r < kDeep; ++r)
      for (int64_t j = 0; j < dp; j += kSide)
        put(halves(from + (m + r) * a.d + j, m + r < a.m ? a.d - j : 0), copy + r * dp + j);
    return copy;
  }

  // to [kDeep, ep] = the left side times `first`. Fetched meanwhile: kDeep rows each of what is read
  // next; jumps from row to row are not what the chip follows by itself.
  void shrink(const BFloat16* from, int64_t stride, float* to, const BFloat16* next,
              const BFloat16* later, const BFloat16* out) const {
    const int64_t row = 2 * stride, below = kSide * row, steps = first.steps;
    const auto fetch = [=](int64_t k) {
      for (int64_t r = 0; next && r < kDeep; ++r)
        __builtin_prefetch(next + r * stride + k * kDeep, 0, 2);
      for (int64_t r = 0; later && r < kDeep; ++r)
        __builtin_prefetch(later + r * stride + k * kDeep, 0, 2);
      for (int64_t r = 0; out && r < kDeep; ++r)
        __builtin_prefetch(out + r * stride + k * kDeep, 1, 2);
    };
    for (int64_t n = 0; n < tiles; n += 2) {
      float* sums = to + n * kSide;
      if (n > 0 && n + 1 < tiles) {
        multiply<2, true>(from, row, kLine, below, first, n, steps, sums, ep, true, nothing);
      } else if (n > 0) {
        multiply<1, true>(from, row, kLine, below, first, n, steps, sums, ep, true, nothing);
      } else if (tiles > 1) {
        multiply<2, true>(from, row, kLine, below, first, n, steps, sums, ep, true, fetch);
      } else {
        multiply<1, true>(from, row, kLine, below, first, n, steps, sums, ep, true, fetch);
      }
    }
  }
  // Row m of `from` where kDeep whole ones follow, else null.
  const BFloat16* whole(const BFloat16* from, int64_t m) const {
    return m + kDeep <= a.m && dp == a.d ? from + m * a.d : nullptr;
  }

  // out [rows, d] = finish(row, column, how many are left, 16 sums), the sums being those of the left
  // side [kDeep, ep] times `second`.
  template <class Finish>
  void expand(const BFloat16* from, int64_t rows, float* to, BFloat16* out, Finish finish) const {
    const int64_t d = a.d;
    for (int64_t n = 0; n < dp / kSide; n += 2) {
      multiply<2, true>(from, 2 * ep, kLine, 2 * kSide * ep, second, n, second.steps, to, kUnit, true,
                        nothing);
      const int64_t begin = n * kSide;
      if (begin + kUnit <= d) {  // without a question each vector
        for (int64_t r = 0; r < rows; ++r) {
          const float* row = to + r * kUnit;
          const F low = finish(r, begin, kSide, at(row));
          const F high = finish(r, begin + kSide, kSide, at(row + kSide));
          *reinterpret_cast<UnalignedU*>(out + r * d + begin) = narrow(low, high);  // a line at once
        }
      } else {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < kUnit; j += kSide)
            put(narrow(finish(r, begin + j, d - begin - j, at(to + r * kUnit + j))),
                out + r * d + begin + j, d - begin - j);
      }
    }
  }

  // The sum of squares is that of x - mean, which rows far from zero need.
  void statistics(const BFloat16* row, float* stats) const {
    const int64_t whole = a.d / kSide * kSide;
    const float d = static_cast<float>(a.d);
    float mean = 0, rest = 0;
    if (a.norm == kLayerNorm) {
      F total = {};
      for (int64_t j = 0; j < whole; j += kSide) total += widened(halves(row + j));
      for (int64_t j = whole; j < a.d; ++j) rest += to_float(row[j]);
      mean = (sum(total) + rest) / d;
    }
    F squares = {};
    for (int64_t j = 0; j < whole; j += kSide) {
      const F v = widened(halves(row + j)) - mean;
      squares = fma(v, v, squares);
    }
    rest = 0;
    for (int64_t j = whole; j < a.d; ++j) rest += (to_float(row[j]) - mean) * (to_float(row[j]) - mean);
    stats[0] = mean;
    stats[1] = 1 / __builtin_sqrtf((sum(squares) + rest) / d + a.eps);
  }

  void forward(int64_t thread, int64_t team) const {
    auto *copy = mine<BFloat16>(thread, block), *h = mine<BFloat16>(thread, narrowed);
    auto *p = mine<float>(thread, sums), *of_unit = mine<float>(thread, part);
    __builtin_memset(h, 0, kDeep * ep * sizeof *h);
    each_block(thread, team, [&](int64_t i) {
      const int64_t m = i * kDeep, rows = min_of(kDeep, a.m - m);
      int64_t stride;
      const BFloat16* from = left(x, m, copy, &stride);
      for (int64_t r = 0; a.norm != kNoNorm && r < rows; ++r)
        statistics(from + r * stride, a.stats + 2 * (m + r));
      shrink(from, stride, p, whole(x, m + kDeep), nullptr, whole(of(a.y), m));
      for (int64_t r = 0; r < rows; ++r) {
        const float mean = a.norm == kNoNorm ? 0 : a.stats[2 * (m + r)];
        const float rate = a.norm == kNoNorm ? 1 : a.stats[2 * (m + r) + 1];
        for (int64_t j = 0; j < tiles * kSide; j += kSide) {
          const F v = fma(all(rate), fma(all(-mean), at(g + j), at(p + r * ep + j)), at(c + j));
          put(narrow(v), of(a.p) + (m + r) * a.e + j, a.e - j);
          put(narrow(activation_of(a.activation, v)), h + r * ep + j, a.e - j);
        }
      }
      const auto *base = y ? y + m * a.d : nullptr;
      // By value: to the compiler what is stored might be any of it.
      const auto finish = [=, d = a.d, scale = a.scale, e = e](int64_t r, int64_t j, int64_t n, F v) {
        v = fma(all(scale), v, at(e + j));
        return base ? v + widened(halves(base + r * d + j, n)) : v;
      };
      expand(h, rows, of_unit, of(a.y) + m * a.d, finish);
    });
  }

  // h and Q as left sides of the products by columns: [blocks, tiles], each a tile
  uint32_t* of_h() const { return reinterpret_cast<uint32_t*>(a.work); }
  uint32_t* of_q() const { return of_h() + blocks * tiles * kTileWords; }

  void by_rows(int64_t thread, int64_t team) const {
    auto *copy = mine<BFloat16>(thread, block), *q = mine<BFloat16>(thread, narrowed);
    auto *dh = mine<float>(thread, sums), *of_unit = mine<float>(thread, part);
    __builtin_memset(q, 0, kDeep * ep * sizeof *q);
    each_block(thread, team, [&](int64_t i) {
      const int64_t m = i * kDeep, rows = min_of(kDeep, a.m - m);
      int64_t stride;
      const BFloat16* from = left(y, m, copy, &stride);
      const bool needs_x = a.dx && a.norm != kNoNorm;
      shrink(from, stride, dh, whole(y, m + kDeep), needs_x ? whole(x, m) : nullptr,
             a.dx ? whole(of(a.dx), m) : nullptr);
      float mean[kDeep] = {}, rate[kDeep];
      for (int64_t r = 0; r < kDeep; ++r) {
        rate[r] = a.norm == kNoNorm || r >= rows ? 1 : a.stats[2 * (m + r) + 1];
        if (a.norm != kNoNorm && r < rows) mean[r] = a.stats[2 * (m + r)];
      }
      const BFloat16* given = of(a.p) + m * a.e;
      const int64_t width = a.e, stride_e = ep;
      const float scale = a.scale;
      const int kind = a.activation;
      F of_x[kDeep] = {}, of_one[kDeep] = {};  // what a norm takes from dx: sums of Q (P - c), Q g
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t j = t * kSide;
        const F shift = at(c + j), of_row = at(g + j);
        F of_dp = {}, of_mean = {};
        U hs[kSide], qs[kSide];
        for (int64_t l = 0; l < kSide; ++l) {
          Half pair[2][2];
          for (int64_t s = 0; s < 2; ++s) {
            const int64_t r = 2 * l + s;
            const F p = widened(halves(given + r * width + j, r < rows ? width - j : 0));
            const F dp = scale * slope_of(kind, p) * at(dh + r * stride_e + j);
            pair[0][s] = narrow(activation_of(kind, p));
            pair[1][s] = narrow(dp * rate[r]);
            put(pair[1][s], q + r * stride_e + j, width - j);
            const F rounded = widened(pair[1][s]);
            of_dp += dp;
            of_mean = fma(rounded, all(mean[r]), of_mean);
            of_x[r] = fma(rounded, p - shift, of_x[r]);
            of_one[r] = fma(rounded, of_row, of_one[r]);
          }
          hs[l] = pairs(pair[0][0], pair[0][1]);
          qs[l] = pairs(pair[1][0], pair[1][1]);
        }
        put(of_dp, of_blocks + 2 * i * ep + j);
        put(of_mean, of_blocks + (2 * i + 1) * ep + j);
        transpose(hs), transpose(qs);
        for (int64_t l = 0; l < kSide; ++l) {
          put(hs[l], of_h() + (i * tiles + t) * kTileWords + l * kSide);
          put(qs[l], of_q() + (i * tiles + t) * kTileWords + l * kSide);
        }
      }
      if (!a.dx) return;
      float alpha[kDeep] = {}, beta[kDeep] = {};
      for (int64_t r = 0; a.norm != kNoNorm && r < rows; ++r) {
        alpha[r] = rate[r] * sum(of_x[r]) / static_cast<float>(a.d);
        if (a.norm == kLayerNorm) beta[r] = sum(of_one[r]) / static_cast<float>(a.d);
      }
      const BFloat16* centred = a.norm == kNoNorm ? nullptr : x + m * a.d;
      const BFloat16* base = a.add_dy ? y + m * a.d : nullptr;
      const auto finish = [=, &alpha, &beta, &mean, d = a.d](int64_t r, int64_t j, int64_t n, F v) {
        const int64_t where = r * d + j;
        if (centred)
          v -= fma(all(alpha[r]), widened(halves(centred + where, n)) - mean[r], all(beta[r]));
        return base ? v + widened(halves(base + where, n)) : v;
      };
      expand(q, rows, of_unit, of(a.dx) + m * a.d, finish);
    });
  }

  // --- by columns ---

  // to = factors^T times units i.. of `from`'s columns; ones, if summed, those columns' sums.
  template <bool summed>
  void outer(const BFloat16* from, const uint32_t* factors, int64_t i, int64_t count, bool products,
             float* to, uint32_t* memory, F* ones) const {
    const Right pairs_of = {memory, kSteps};
    const int64_t begin = i * kUnit, d = a.d;
    const bool whole = count == kUnits && begin + kUnits * kUnit <= d;
    for (int64_t b = 0; b < blocks; b += kSteps) {
      const int64_t steps = min_of(kSteps, blocks - b);
      F chains[2 * kUnits] = {};
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t p = 0; p < kSide; ++p) {
          const int64_t m = (b + k) * kDeep + 2 * p;
          const BFloat16* row = from + m * d + begin;
          if (whole && m + 1 < a.m) {
            uint32_t* to_pair = pairs_of.tile(0, k) + p * kSide;
#pragma GCC unroll 8
            for (int64_t t = 0; t < 2 * kUnits; ++t) {
              const Half low = halves(row + t * kSide), high = halves(row + d + t * kSide);
              put(pairs(low, high), to_pair + t * kSteps * kTileWords);
              if (summed) chains[t] += widened(low) + widened(high);
            }
            for (int64_t t = 0; t < 2 * kUnits; t += 2) {
              __builtin_prefetch(row + kAhead * d + t * kSide, 0, 2);
              __builtin_prefetch(row + (kAhead + 1) * d + t * kSide, 0, 2);
            }
            continue;
          }
          for (int64_t t = 0; t < 2 * count; ++t, row += kSide) {
            const int64_t n = d - begin - t * kSide;
            const Half low = halves(row, m < a.m ? n : 0), high = halves(row + d, m + 1 < a.m ? n : 0);
            put(pairs(low, high), pairs_of.tile(t, k) + p * kSide);
            if (summed) chains[t] += widened(low) + widened(high);
          }
        }
      for (int64_t t = 0; summed && t < 2 * count; ++t) ones[t] += chains[t];
      for (int64_t u = 0; products && u < count; ++u)
        for (int64_t t = 0; t < tiles; t += 2) {
          const uint32_t* side = factors + (b * tiles + t) * kTileWords;
          float* of_unit = to + u * unit_size() + t * kSide * kUnit;
          constexpr int64_t bytes = 4 * kTileWords;
          if (t + 1 < tiles) {
            multiply<2, true>(side, kLine, tiles * bytes, bytes, pairs_of, 2 * u, steps, of_unit, kUnit,
                              b == 0, nothing);
          } else {
            multiply<2, false>(side, kLine, tiles * bytes, bytes, pairs_of, 2 * u, steps, of_unit,
                               kUnit, b == 0, nothing);
          }
        }
    }
  }

  // U's gradient from a unit of h^T dy.
  void finish_up(int64_t begin, const float* from) const {
    for (int64_t j = 0; j < kUnit && begin + j < a.d; j += kSide)
      for (int64_t r = 0; r < a.e; r += kDeep) {
        U v[kSide] = {};
        for (int64_t p = 0; p < kSide && r + 2 * p < tiles * kSide; ++p) {
          const float* row = from + (r + 2 * p) * kUnit + j;
          v[p] = pairs(narrow(a.scale * at(row)), narrow(a.scale * at(row + kUnit)));
        }
        transpose(v);
        for (int64_t l = 0; l < min_of(kSide, a.d - begin - j); ++l) {
          BFloat16* to = of(a.dup) + (begin + j + l) * a.e + r;
          if (r + kDeep <= a.e) {
            *reinterpret_cast<UnalignedU*>(to) = v[l];
          } else {
            __builtin_memcpy(to, &v[l], 2 * (a.e - r));
          }
        }
      }
  }

  // From a unit of Q^T x: D's gradient, and the columns' sums that are the norm's.
  void finish_down(int64_t begin, const float* from, const float* dc, const float* centre) const {
    for (int64_t j = begin; j < begin + kUnit && j < a.d; j += kSide, from += kSide) {
      const int64_t n = a.d - j;
      const F w = a.norm_weight ? widened(halves(of(a.norm_weight) + j, n)) : all(1.0f);
      const F b = a.norm_bias ? widened(halves(of(a.norm_bias) + j, n)) : F{};
      F dw = {}, db = {};
      for (int64_t r = 0; r < a.e; ++r) {
        const F v = at(from + r * kUnit) - centre[r], d = widened(halves(of(a.down) + r * a.d + j, n));
        dw = fma(v, d, dw);
        db = fma(all(dc[r]), d, db);
        if (a.ddown) put(narrow(fma(v, w, dc[r] * b)), of(a.ddown) + r * a.d + j, n);
      }
      if (a.dnorm_weight) put(narrow(dw), of(a.dnorm_weight) + j, n);
      if (a.dnorm_bias) put(narrow(db), of(a.dnorm_bias) + j, n);
    }
  }

  void by_columns(int64_t thread, int64_t team) const {
    auto *to = mine<float>(thread, units), *dc = mine<float>(thread, totals), *centre = dc + ep;
    auto* memory = mine<uint32_t>(thread, panel);
    for (int64_t j = 0; j < tiles * kSide; j += kSide) {
      F of_dp = {}, of_mean = {};
      for (int64_t i = 0; i < blocks; ++i) {
        of_dp += at(of_blocks + 2 * i * ep + j);
        of_mean += at(of_blocks + (2 * i + 1) * ep + j);
      }
      put(of_dp, dc + j), put(of_mean, centre + j);
      if (a.ddown_bias && thread == 0) put(narrow(of_dp), of(a.ddown_bias) + j, a.e - j);
    }
    const int64_t end = dp / kUnit * (thread + 1) / team;
    for (int64_t i = dp / kUnit * thread / team; i < end; i += kUnits) {
      const int64_t count = min_of(kUnits, end - i);
      if (a.dup || a.dup_bias) {
        F ones[2 * kUnits] = {};
        outer<true>(y, of_h(), i, count, a.dup != nullptr, to, memory, ones);
        for (int64_t u = 0; a.dup && u < count; ++u) finish_up((i + u) * kUnit, to + u * unit_size());
        for (int64_t t = 0; a.dup_bias && t < 2 * count; ++t) {
          const int64_t j = i * kUnit + t * kSide;
          put(narrow(a.scale * ones[t]), of(a.dup_bias) + j, a.d - j);
        }
      }
      if (a.ddown || a.dnorm_weight || a.dnorm_bias) {
        outer<false>(x, of_q(), i, count, true, to, memory, nullptr);
        for (int64_t u = 0; u < count; ++u)
          finish_down((i + u) * kUnit, to + u * unit_size(), dc, centre);
      }
    }
  }

  void run() {
    const int threads = static_cast<int>(min_of(omp_get_max_threads(), blocks));
    allocate(threads);
    TileShapes shapes;
    for (int t = 0; t < 8; ++t) shapes.rows[t] = kSide, shapes.bytes[t] = kLine;
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      tiles_begin(shapes);
      pack(thread, team);
      meet();
      if (backward) {
        by_rows(thread, team);
        meet();
        by_columns(thread, team);
      } else {
        forward(thread, team);
      }
      tiles_end();
    }
  }
};

}  // namespace
}  // namespace fusedpeft::cpu
