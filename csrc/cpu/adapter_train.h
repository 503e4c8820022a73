// y = residual + scale * (act(norm(x) D^T + c) U^T + e) for many tokens, and its gradients; fp32
// inside. Included by one file for each instruction set.
//
// Forward, a block of rows at a time: x is read once, normalised where it lies in the cache, and
// both products run on it there. The weights are packed first, once a call, into what the products
// stream through. Backward is two passes in one parallel region:
//   1. by rows: G = dy U, dP = scale * act'(P) * G, dx = dy + dP D (and a norm's two terms);
//   2. by columns: dU^T = h^T dy and dD = dP^T norm(x), each thread its own columns of all rows.
// A sum runs over d, E or the rows in the same order whatever the threads are.
#pragma once

#include "panels.h"

namespace fusedpeft::cpu {
namespace {

constexpr int64_t kBlockRows = 24;   // of x in the cache
constexpr int64_t kPanel = 128;      // rows whose share of a column's sums is added at a time
constexpr int64_t kPanels = 4;       // blocks of columns read at once: a few lines in a row

// --- rows in any dtype ------------------------------------------------------------------------------

struct Rows {  // [*, width], contiguous
  const void* data;
  int64_t width;
  int dtype;

  // n numbers from (row, column) on.
  void load(int64_t row, int64_t column, float* to, int64_t n) const {
    const int64_t first = row * width + column;
    if (dtype == kFloat32) return load_as(static_cast<const float*>(data) + first, to, n);
    if (dtype == kBFloat16) return load_as(static_cast<const BFloat16*>(data) + first, to, n);
    load_as(static_cast<const Float16*>(data) + first, to, n);
  }
  void store(int64_t row, int64_t column, const float* from, int64_t n) const {
    const int64_t first = row * width + column;
    void* to = const_cast<void*>(data);
    if (dtype == kFloat32) return store_as(from, static_cast<float*>(to) + first, n);
    if (dtype == kBFloat16) return store_as(from, static_cast<BFloat16*>(to) + first, n);
    store_as(from, static_cast<Float16*>(to) + first, n);
  }
  void prefetch(int64_t row, int64_t column, int64_t n) const {
    const int64_t bytes = dtype == kFloat32 ? 4 : 2;
    const char* from = static_cast<const char*>(data) + (row * width + column) * bytes;
    for (int64_t i = 0; i < n * bytes; i += kLine) __builtin_prefetch(from + i, 0, 2);
  }
};

// --- the call -------------------------------------------------------------------------------------

struct AdapterTrainCall {
  const AdapterTrain& a;
  const bool backward;
  const Rows x, y, p, down, up;
  const Columns of_e, of_d;
  const int64_t sx;  // of a row of d floats: a line more, see Packings
  Packed first, second;  // x D^T (dy U), h U^T (dP D)
  float *c, *e, *sums_of_d, *own;  // c + D beta; e; D's rows' sums; the threads' memory
  int64_t own_size;

  explicit AdapterTrainCall(const AdapterTrain& a)
      : a(a),
        backward(a.dy != nullptr),
        x{a.x, a.d, a.dtype},
        y{backward ? a.dy : a.y, a.d, a.dtype},
        p{a.p, a.e, a.adapter_dtype},
        down{a.down, a.d, a.adapter_dtype},
        up{a.up, a.e, a.adapter_dtype},
        of_e(a.e),
        of_d(a.d),
        sx(of_d.padded() + kLine / 4),
        first{nullptr, a.d, of_e},
        second{nullptr, a.e, of_d} {}

  int64_t ep() const { return of_e.padded(); }
  int64_t dp() const { return of_d.padded(); }
  int64_t tiled() const { return round_up(ep(), kTileRows); }

  void allocate(int64_t threads) {
    const int64_t rows = kBlockRows * (sx + ep() + kTileColumns) + ep();
    const int64_t columns = (kPanels * (2 * tiled() + kPanel) + 1) * kTileColumns + 2 * ep();
    own_size = round_up(max_of(max_of(rows, columns), kWidth * (sx + ep())), kLine / 4);
    const int64_t shared = round_up(a.d * ep() + a.e * dp() + 2 * ep() + dp(), kLine / 4);
    float* memory = static_cast<float*>(
        scratch((shared + threads * own_size) * static_cast<int64_t>(sizeof(float))));
    first.data = memory;
    second.data = first.data + a.d * ep();
    c = second.data + a.e * dp();
    sums_of_d = c + ep();
    e = sums_of_d + ep();
    own = memory + shared;
  }

  static int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

  // Vectors of E and of d, packed; D with the norm's weight in it.
  void pack(int64_t thread, int64_t team) const {
    float* rows = own + thread * own_size;  // kWidth of them
    const auto padded = [](const Rows& from, int64_t row, int64_t n, float* to, int64_t stride) {
      int64_t i = 0;
      if (from.data && row >= 0) from.load(row, 0, to, i = n);
      for (; i < stride; ++i) to[i] = 0;
    };
    const Rows norm_weight = {a.norm_weight, a.d, a.adapter_dtype};
    const Rows norm_bias = {a.norm_bias, a.d, a.adapter_dtype};
    for (int64_t v = of_e.vectors * thread / team; v < of_e.vectors * (thread + 1) / team; ++v) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t r = v * kWidth + i;
        float* row = rows + i * sx;
        padded(down, r < a.e ? r : -1, a.d, row, sx);
        c[r] = 0;
        if (a.down_bias && r < a.e) Rows{a.down_bias, a.e, a.adapter_dtype}.load(0, r, c + r, 1);
        if (a.norm_bias) c[r] += times(norm_bias, row, false);
        if (a.norm_weight) times(norm_weight, row, true);
        F total = {};
        for (int64_t k = 0; k < dp(); k += kWidth) total += at(row + k);
        sums_of_d[r] = sum(total);
        if (backward && r < a.e) second.put_row(r, row);
      }
      if (!backward) first.put_columns(v * kWidth, rows, sx);
    }
    for (int64_t v = of_d.vectors * thread / team; v < of_d.vectors * (thread + 1) / team; ++v) {
      const int64_t stride = ep();
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t r = v * kWidth + i;
        padded(up, r < a.d ? r : -1, a.e, rows + i * stride, stride);
        e[r] = 0;
        if (r < a.d && a.up_bias) Rows{a.up_bias, a.d, a.adapter_dtype}.load(0, r, e + r, 1);
        if (backward && r < a.d) first.put_row(r, rows + i * stride);
      }
      if (!backward) second.put_columns(v * kWidth, rows, stride);
    }
  }

  // The sum of row's products with a vector of d; keep: they replace row.
  float times(const Rows& vector, float* row, bool keep) const {
    F total = {};
    for (int64_t k = 0; k < a.d; k += kWidth) {
      float part[kWidth] = {};
      vector.load(0, k, part, min_of(kWidth, a.d - k));
      const F product = at(part) * at(row + k);
      total += product;
      if (keep) put(product, row + k);
    }
    return sum(total);
  }

  // row = (row - mean) / deviation, zeros behind it; the two go to stats. The sum of squares is that
  // of x - mean, which rows far from zero need.
  void normalise(float* row, float* stats) const {
    const float d = static_cast<float>(a.d);
    float mean = 0;
    if (a.norm == kLayerNorm) {
      F total = {};
      for (int64_t i = 0; i < dp(); i += kWidth) total += at(row + i);
      mean = sum(total) / d;
      for (int64_t i = 0; i < a.d; ++i) row[i] -= mean;
    }
    F squares = {};
    for (int64_t i = 0; i < dp(); i += kWidth) squares = fma(at(row + i), at(row + i), squares);
    const float rate = 1 / __builtin_sqrtf(sum(squares) / d + a.eps);
    for (int64_t i = 0; i < dp(); i += kWidth) put(at(row + i) * rate, row + i);
    stats[0] = mean;
    stats[1] = rate;
  }

  // Calls work(first row, how many) for a thread's blocks of rows.
  template <class Work>
  void blocks(int64_t thread, int64_t team, Work work) const {
    const int64_t count = ceil_div(a.m, kBlockRows);
    for (int64_t i = count * thread / team; i < count * (thread + 1) / team; ++i)
      work(i * kBlockRows, min_of(kBlockRows, a.m - i * kBlockRows));
  }

  void load_block(const Rows& from, int64_t m, int64_t rows, float* to) const {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t n = r < rows ? a.d : 0;
      if (r < rows) from.load(m + r, 0, to + r * sx, n);
      for (int64_t i = n; i < dp(); ++i) to[r * sx + i] = 0;
    }
  }

  // --- forward ---

  void forward(int64_t thread, int64_t team) const {
    float* block = own + thread * own_size;
    float* h = block + kBlockRows * sx;
    float* part = h + kBlockRows * ep();
    const Rows residual = {a.residual, a.d, a.dtype};
    const bool same = a.residual == a.x && a.norm == kNoNorm;  // the block holds the residual
    blocks(thread, team, [&](int64_t m, int64_t rows) {
      load_block(x, m, rows, block);
      if (a.norm != kNoNorm)
        for (int64_t r = 0; r < rows; ++r) normalise(block + r * sx, a.stats + 2 * (m + r));
      for (int64_t i = 0; i < of_e.blocks; ++i)
        first.multiply(i, block, sx, rows, h + of_e.begin(i), ep());
      for (int64_t r = 0; r < rows; ++r) {
        float* row = h + r * ep();
        for (int64_t i = 0; i < ep(); i += kWidth) put(at(row + i) + at(c + i), row + i);
        p.store(m + r, 0, row, a.e);
        for (int64_t i = 0; i < ep(); i += kWidth)
          put(a.scale * activation_of(a.activation, at(row + i)), row + i);
      }
      for (int64_t i = 0; i < of_d.blocks; ++i) {
        const int64_t begin = of_d.begin(i), width = of_d.width(i), n = min_of(width, a.d - begin);
        second.multiply(i, h, ep(), rows, part, kTileColumns);
        for (int64_t r = 0; r < rows; ++r) {
          float* row = part + r * kTileColumns;
          float base[kTileColumns] = {};
          if (!same && a.residual) residual.load(m + r, begin, base, n);
          const float* from = same ? block + r * sx + begin : base;
          for (int64_t j = 0; j < width; j += kWidth)
            put(at(from + j) + fma(all(a.scale), at(e + begin + j), at(row + j)), row + j);
          y.store(m + r, begin, row, n);
        }
      }
    });
  }

  // --- backward ---

  float* of_h(int64_t m) const { return a.work + m * ep(); }
  float* of_dp(int64_t m) const { return a.work + (a.m + m) * ep(); }

  void by_rows(int64_t thread, int64_t team) const {
    float* block = own + thread * own_size;
    float* g = block + kBlockRows * sx;
    float* part = g + kBlockRows * ep();
    float* before = part + kBlockRows * kTileColumns;  // P of a row
    const Rows dx = {a.dx, a.d, a.dtype};
    for (int64_t i = a.e; i < ep(); ++i) before[i] = 0;
    blocks(thread, team, [&](int64_t m, int64_t rows) {
      load_block(y, m, rows, block);
      for (int64_t i = 0; i < of_e.blocks; ++i)
        first.multiply(i, block, sx, rows, g + of_e.begin(i), ep());
      float centre[kBlockRows] = {}, alpha[kBlockRows] = {}, beta[kBlockRows] = {};
      for (int64_t r = 0; r < rows; ++r) {
        p.load(m + r, 0, before, a.e);
        float *h = of_h(m + r), *dp = of_dp(m + r), *row = g + r * ep();
        F of_x = {}, of_one = {};
        const float rate = a.norm == kNoNorm ? 1 : a.stats[2 * (m + r) + 1];
        for (int64_t i = 0; i < ep(); i += kWidth) {
          const F v = at(before + i);
          put(a.scale * activation_of(a.activation, v), h + i);
          const F grad = a.scale * slope_of(a.activation, v) * at(row + i);
          put(grad, dp + i);
          put(grad * rate, row + i);
          of_x = fma(grad, v - at(c + i), of_x);
          of_one = fma(grad, at(sums_of_d + i), of_one);
        }
        if (a.norm == kNoNorm) continue;
        centre[r] = a.stats[2 * (m + r)];
        alpha[r] = rate * rate * sum(of_x) / static_cast<float>(a.d);
        if (a.norm == kLayerNorm) beta[r] = rate * sum(of_one) / static_cast<float>(a.d);
      }
      if (!a.dx) return;
      for (int64_t i = 0; i < of_d.blocks; ++i) {
        const int64_t begin = of_d.begin(i), width = of_d.width(i), n = min_of(width, a.d - begin);
        second.multiply(i, g, ep(), rows, part, kTileColumns);
        for (int64_t r = 0; r < rows; ++r) {
          float* row = part + r * kTileColumns;
          const float* from = block + r * sx + begin;
          if (a.norm != kNoNorm) {
            float given[kTileColumns] = {};
            x.load(m + r, begin, given, n);
            for (int64_t j = 0; j < width; j += kWidth)
              put(at(row + j) - fma(all(alpha[r]), at(given + j) - centre[r], all(beta[r])), row + j);
          }
          if (a.add_dy)
            for (int64_t j = 0; j < width; j += kWidth) put(at(row + j) + at(from + j), row + j);
          dx.store(m + r, begin, row, n);
        }
      }
    });
  }

  // sums[i] (+)= a row of `from` each kPanel rows in a chain of their own.
  void bias_gradient(float* sums) const {
    for (int64_t i = 0; i < ep(); i += kWidth) {
      F total = {};
      for (int64_t m = 0; m < a.m; m += kPanel) {
        F chain = {};
        for (int64_t r = m; r < min_of(m + kPanel, a.m); ++r) chain += at(of_dp(r) + i);
        total += chain;
      }
      put(total, sums + i);
    }
  }

  // to [rows of E, width] (+)= the rows of `factors` m.. transposed times `panel`.
  void add_outer(const float* factors, const float* panel, int64_t rows, int64_t width, float* to,
                 bool fresh) const {
    const int64_t vectors = width / kWidth;
    const auto run = tile_of(vectors);
    for (int64_t i = 0; i < ep(); i += kTileRows)  // the last rows may be none of E's
      run(factors + i, 1, ep(), panel, rows, to + i * kTileColumns, kTileColumns, fresh);
  }

  void by_columns(int64_t thread, int64_t team) const {
    float* dc = own + thread * own_size;  // [ep], before what a block of columns takes
    const int64_t sums = tiled() * kTileColumns, panels = kPanel * kTileColumns;  // of a block
    float* of_up = dc + ep();
    float* of_down = of_up + kPanels * sums;
    float* panel = of_down + kPanels * sums;
    float* edge = panel + kPanels * panels;
    if (a.ddown_bias || a.dnorm_bias || (a.ddown && a.norm_bias)) bias_gradient(dc);
    if (a.ddown_bias && thread == 0) Rows{a.ddown_bias, a.e, a.adapter_dtype}.store(0, 0, dc, a.e);
    const bool up_side = a.dup || a.dup_bias, down_side = a.ddown || a.dnorm_weight || a.dnorm_bias;
    const int64_t end = of_d.blocks * (thread + 1) / team;
    for (int64_t i = of_d.blocks * thread / team; i < end; i += kPanels) {
      const int64_t count = min_of(kPanels, end - i);
      F of_bias[kPanels][kTileVectors] = {};
      for (int64_t m = 0; m < a.m; m += kPanel) {
        const int64_t rows = min_of(kPanel, a.m - m);
        if (up_side) {
          load_panels(y, m, rows, i, count, false, panel);
          for (int64_t b = 0; b < count; ++b) {
            const float* own = panel + b * panels;
            const int64_t width = of_d.width(i + b);
            if (a.dup) add_outer(of_h(m), own, rows, width, of_up + b * sums, m == 0);
            for (int64_t v = 0; v < width / kWidth; ++v) {
              F chain = {};
              for (int64_t r = 0; r < rows; ++r) chain += at(own + r * width + v * kWidth);
              of_bias[b][v] += chain;
            }
          }
        }
        if (down_side) {
          load_panels(x, m, rows, i, count, a.norm != kNoNorm, panel);
          for (int64_t b = 0; b < count; ++b)
            add_outer(of_dp(m), panel + b * panels, rows, of_d.width(i + b), of_down + b * sums,
                      m == 0);
        }
      }
      for (int64_t b = 0; b < count; ++b) {
        const int64_t begin = of_d.begin(i + b), n = min_of(of_d.width(i + b), a.d - begin);
        if (a.dup_bias) {
          for (int64_t v = 0; v < kTileVectors; ++v) put(a.scale * of_bias[b][v], edge + v * kWidth);
          Rows{a.dup_bias, a.d, a.adapter_dtype}.store(0, begin, edge, n);
        }
        for (int64_t j = 0; a.dup && j < n; ++j) {
          for (int64_t r = 0; r < a.e; ++r) edge[r] = of_up[b * sums + r * kTileColumns + j];
          Rows{a.dup, a.e, a.adapter_dtype}.store(begin + j, 0, edge, a.e);
        }
        if (down_side) finish_down(begin, n, of_down + b * sums, dc, panel);
      }
    }
  }

  // Rows m.. of blocks i.. of columns, each block's [rows, width] behind the other; those after them
  // are fetched.
  void load_panels(const Rows& from, int64_t m, int64_t rows, int64_t i, int64_t count, bool norm,
                   float* panel) const {
    const int64_t begin = of_d.begin(i), end = min_of(of_d.begin(i + count), a.d);
    int64_t first[kPanels], width[kPanels];
    for (int64_t b = 0; b < count; ++b) {
      first[b] = of_d.begin(i + b);
      width[b] = of_d.width(i + b);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (m + r + kPanel < a.m) from.prefetch(m + r + kPanel, begin, end - begin);
      for (int64_t b = 0; b < count; ++b) {
        float* to = panel + b * kPanel * kTileColumns + r * width[b];
        const int64_t n = min_of(width[b], a.d - first[b]);
        from.load(m + r, first[b], to, n);
        for (int64_t j = n; j < width[b]; ++j) to[j] = 0;
        if (!norm) continue;
        const float* stats = a.stats + 2 * (m + r);
        for (int64_t j = 0; j < width[b]; j += kWidth) put((at(to + j) - stats[0]) * stats[1], to + j);
      }
    }
  }

  // From sums [E, columns] of dP^T norm(x): D's gradient, with the norm's weight w and bias b
  // sums * w + dc b^T, and theirs, the columns' sums of sums * D and of dc * D.
  void finish_down(int64_t begin, int64_t n, float* sums, const float* dc, float* memory) const {
    const Rows ddown = {a.ddown, a.d, a.adapter_dtype};
    float *w = memory, *b = w + kTileColumns, *row = b + kTileColumns;
    float *dw = row + kTileColumns, *db = dw + kTileColumns;
    for (int64_t j = 0; j < n; ++j) {
      w[j] = 1;
      b[j] = dw[j] = db[j] = 0;
    }
    if (a.norm_weight) Rows{a.norm_weight, a.d, a.adapter_dtype}.load(0, begin, w, n);
    if (a.norm_bias) Rows{a.norm_bias, a.d, a.adapter_dtype}.load(0, begin, b, n);
    for (int64_t r = 0; r < a.e; ++r) {
      float* own_sums = sums + r * kTileColumns;
      if (a.dnorm_weight || a.dnorm_bias) {
        down.load(r, begin, row, n);
        for (int64_t j = 0; j < n; ++j) {
          dw[j] += own_sums[j] * row[j];
          if (a.dnorm_bias) db[j] += dc[r] * row[j];
        }
      }
      if (!a.ddown) continue;
      for (int64_t j = 0; j < n; ++j)
        own_sums[j] = own_sums[j] * w[j] + (a.norm_bias ? dc[r] * b[j] : 0.0f);
      ddown.store(r, begin, own_sums, n);
    }
    if (a.dnorm_weight) Rows{a.dnorm_weight, a.d, a.adapter_dtype}.store(0, begin, dw, n);
    if (a.dnorm_bias) Rows{a.dnorm_bias, a.d, a.adapter_dtype}.store(0, begin, db, n);
  }

  void run() {
    const int threads = static_cast<int>(min_of(omp_get_max_threads(), ceil_div(a.m, kBlockRows)));
    allocate(threads);
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      pack(thread, team);
      meet();
      if (backward) {
        by_rows(thread, team);
        meet();
        by_columns(thread, team);
      } else {
        forward(thread, team);
      }
    }
  }
};

inline void adapter_train_any(const AdapterTrain& a) { AdapterTrainCall(a).run(); }

}  // namespace
}  // namespace fusedpeft::cpu
