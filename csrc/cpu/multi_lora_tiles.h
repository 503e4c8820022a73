// multi_lora.h in bf16 on a unit that multiplies tiles (AMX): the same y and the same order of work,
// but W and B meet all tokens of a batch 16 rows at a time, so that 16 tokens take the time of one,
// which is that of reading W.
//
// A tile has 16 rows of up to 64 bytes. Of W and B: as they lie in memory. Of x and S: a row for each
// pair of elements, in it the pair of every token, zeros for tokens that S is not of. S goes in as two
// numbers of bf16, what it rounds to and what that leaves, for sums as exact as from its fp32.
//
// For K a multiple of 32 and adapters in bf16. Included last by a file that has defined
//   tiles_begin(const TileShapes&), tiles_end()   around a thread's use of tiles; begin: all are zero
//   tile_zero<t>(), tile_load<t>(from, bytes), tile_store<t>(to, bytes)   bytes: between rows
//   tile_dot<c, w, x>()   c[i, m] += w[i, 2p] x[p, 2m] + w[i, 2p + 1] x[p, 2m + 1] over all p
#pragma once

#include "multi_lora.h"

namespace fusedpeft::cpu {
namespace {

struct InMemory {};  // W's rows, where they are not made; see MadeOfCodes in quantised_tiles.h

template <class Pairs, class Rows = InMemory>
struct TileCall : MultiCall<BFloat16, BFloat16, Pairs, Pairs> {
  using Base = MultiCall<BFloat16, BFloat16, Pairs, Pairs>;
  using Base::bias, Base::d, Base::w;
  // Rows of W at a time. Not 32: the chip follows 32 streams, and those of A and B come beside W's.
  static constexpr int64_t kSplit = 16;
  static constexpr int64_t kPiece = 32, kFew = 8;  // elements of a row of W, or ranks; ranks
  static constexpr int64_t kAhead = 12;            // pieces of W that are fetched before their turn
  // Two sums, so that products need not wait for each other; rows of W and pairs of x, or kPiece ranks
  // of B and S; kFew ranks of B and S.
  enum { kSum0, kSum1, kW, kX, kB, kS };

  const Rows made;
  const int64_t columns;  // tokens of a tile: a power of two, so that no row lies in two lines
  uint32_t *xs, *ss;      // pairs of x: [batch, K / 2, columns]; of a part's S: [2, ranks / 2, columns]

  static int64_t columns_for(const MultiLora& d) {
    int64_t columns = 1;
    while (columns * d.batch_count < d.m) columns *= 2;
    return columns;
  }
  static int64_t x_size(const MultiLora& d) { return d.batch_count * d.k / 2 * columns_for(d); }

  explicit TileCall(const MultiLora& d, const Rows& made = {})
      : Base(d, x_size(d) + d.s_size * columns_for(d)), made(made), columns(columns_for(d)) {
    xs = reinterpret_cast<uint32_t*>(this->s + d.s_size + this->x.floats(d.m, d.k));
    ss = xs + x_size(d);
  }

  uint32_t* pairs_of(const LoraPart& p) const { return ss + p.s * columns; }
  static int64_t ranks(const LoraPart& p) { return round_up(p.rank, kFew); }  // zeros behind p.rank

  void pack(int64_t thread, int64_t team) const {
    Base::pack(thread, team);
    const int64_t pieces = d.k / kPiece, half = kPiece / 2;
    for (int64_t i = 0; i < d.batch_count; ++i)
      for (int64_t j = pieces * thread / team; j < pieces * (thread + 1) / team; ++j) {
        const int first = d.batches[i].begin;
        uint32_t* to = xs + (i * pieces + j) * half * columns;
        for (int m = first; m < d.batches[i].end; ++m) {
          uint32_t pairs[half];
          const auto* x = static_cast<const BFloat16*>(d.x) + d.order[m] * d.sx + j * kPiece;
          __builtin_memcpy(pairs, x, sizeof pairs);
          for (int64_t p = 0; p < half; ++p) to[p * columns + m - first] = pairs[p];
        }
        for (int64_t m = d.batches[i].end - first; m < columns; ++m)
          for (int64_t p = 0; p < half; ++p) to[p * columns + m] = 0;
      }
    for (int64_t i = d.part_count * thread / team; i < d.part_count * (thread + 1) / team; ++i)
      __builtin_memset(pairs_of(d.parts[i]), 0, ranks(d.parts[i]) * columns * sizeof *ss);
  }

  void shrink(int64_t thread, int64_t team) const {
    Base::shrink(thread, team, [&](const LoraPart& p, int64_t m, int64_t r, float v) {
      auto* to = reinterpret_cast<BFloat16*>(pairs_of(p) + r / 2 * columns + p.column + m) + r % 2;
      from_float(v, to);
      const float left = v - to_float(*to);
      from_float(left - left == 0 ? left : 0, to + ranks(p) * columns);
    });
  }

  // ready() returns when S stands.
  template <class Ready>
  void expand(int64_t begin, int64_t end, Ready ready) const {
    if (begin >= end) return ready();
    int64_t shaped = 0;
    for (int64_t n = begin, stop; n < end; n = stop) {
      stop = stop_of(n, min_of(n + kSplit, end));
      if (stop - n != shaped) shape(shaped = stop - n);
      expand_rows(n, stop, n == begin, ready);
    }
    tiles_end();
  }

  template <class Ready>
  void expand_rows(int64_t n, int64_t stop, bool first, Ready ready) const {
    alignas(kLine) float sums[2 * kSplit * kTokens];
    for (const Batch* batch = d.batches; batch < d.batches + d.batch_count; ++batch) {
      const auto parts = [&](auto fn) {
        this->each_part(*batch, n, stop, [&](const LoraPart& p, int64_t, int64_t) { fn(p); });
      };
      if (first) parts([&](const LoraPart& p) { this->fetch(p, n, stop); });
      base(*batch, n, stop);
      if (first && batch == d.batches) ready();
      parts([&](const LoraPart& p) {
        this->fetch(p, stop, min_of(stop + kSplit, p.first + p.rows));
        update(p, n);
      });
      if (finish(sums, stop - n)) {
        store(sums, n, stop, *batch, 0, batch->end - batch->begin);
        continue;
      }
      // 0 times what is not finite would be NaN for the tokens of other adapters: each on its own.
      base(*batch, n, stop);
      finish(sums, stop - n);
      store(sums, n, stop, *batch, 0, batch->end - batch->begin);
      parts([&](const LoraPart& p) {
        base(*batch, n, stop);
        update(p, n);
        finish(sums, stop - n);
        store(sums, n, stop, *batch, p.column, p.column + p.end - p.begin);
      });
    }
  }

  // Rows that are held at once belong to the same parts.
  int64_t stop_of(int64_t n, int64_t stop) const {
    for (const LoraPart* p = d.parts; p < d.parts + d.part_count; ++p) {
      const int64_t end = p->first + p->rows;
      if (n < p->first) stop = min_of(stop, p->first);
      if (n < end) stop = min_of(stop, end);
    }
    return stop;
  }

  void shape(int64_t rows) const {
    TileShapes shapes;
    const auto set = [&](int tile, int64_t tile_rows, int64_t bytes) {
      shapes.rows[tile] = static_cast<uint8_t>(tile_rows);
      shapes.bytes[tile] = static_cast<uint16_t>(bytes);
    };
    set(kSum0, rows, 4 * columns);
    set(kSum1, rows, 4 * columns);
    set(kW, rows, 2 * kPiece);
    set(kX, kPiece / 2, 4 * columns);
    set(kB, rows, 2 * kFew);
    set(kS, kFew / 2, 4 * columns);
    tiles_begin(shapes);
  }

  void base(const Batch& batch, int64_t n, int64_t stop) const {
    const int64_t pieces = d.k / kPiece, row = d.sw * 2, step = kPiece / 2 * columns;
    const uint32_t* x = xs + (&batch - d.batches) * pieces * step;
    if constexpr (!__is_same(Rows, InMemory)) return base_made(x, n, stop);
    const char* from = reinterpret_cast<const char*>(w + n * d.sw);
    const char* next = reinterpret_cast<const char*>(w + stop * d.sw);
    tile_zero<kSum0>();
    tile_zero<kSum1>();
    for (int64_t j = 0; j < pieces; ++j) {
      const int64_t soon = j + kAhead;
      const char* ahead = soon < pieces ? from + soon * kLine : next + (soon - pieces) * kLine;
      for (int64_t i = 0; i < stop - n; ++i) __builtin_prefetch(ahead + i * row, 0, 3);
      tile_load<kX>(x + j * step, 4 * columns);
      tile_load<kW>(from + j * kLine, row);
      if (j % 2 == 0) {
        tile_dot<kSum0, kW, kX>();
      } else {
        tile_dot<kSum1, kW, kX>();
      }
    }
  }

  void base_made(const uint32_t* x, int64_t n, int64_t stop) const {
    constexpr int64_t kMade = 512, kStride = kMade + kPiece;
    alignas(kLine) BFloat16 rows[kSplit * kStride];
    tile_zero<kSum0>();
    tile_zero<kSum1>();
    for (int64_t col = 0; col < d.k; col += kMade) {
      const int64_t cols = min_of(kMade, d.k - col);
      made(n, stop - n, col, cols, rows, kStride);
      for (int64_t j = 0; j < cols; j += kPiece, x += kPiece / 2 * columns) {
        tile_load<kX>(x, 4 * columns);
        tile_load<kW>(rows + j, 2 * kStride);
        if (j / kPiece % 2 == 0) {
          tile_dot<kSum0, kW, kX>();
        } else {
          tile_dot<kSum1, kW, kX>();
        }
      }
    }
  }

  void update(const LoraPart& p, int64_t n) const {
    const auto* b = static_cast<const BFloat16*>(p.b) + (n - p.first) * p.sb;
    const uint32_t *s = pairs_of(p), *left = s + ranks(p) / 2 * columns;
    int64_t r = 0;
    for (; r + kPiece <= ranks(p); r += kPiece) {
      tile_load<kW>(b + r, 2 * p.sb);
      tile_load<kX>(s + r / 2 * columns, 4 * columns);
      tile_dot<kSum0, kW, kX>();
      tile_load<kX>(left + r / 2 * columns, 4 * columns);
      tile_dot<kSum1, kW, kX>();
    }
    for (; r < ranks(p); r += kFew) {
      tile_load<kB>(b + r, 2 * p.sb);
      tile_load<kS>(s + r / 2 * columns, 4 * columns);
      tile_dot<kSum0, kB, kS>();
      tile_load<kS>(left + r / 2 * columns, 4 * columns);
      tile_dot<kSum1, kB, kS>();
    }
  }

  // The sums [row, column] out of their tiles, and whether all are finite.
  bool finish(float* sums, int64_t rows) const {
    float* second = sums + kSplit * kTokens;
    tile_store<kSum0>(sums, 4 * columns);
    tile_store<kSum1>(second, 4 * columns);
    bool finite = true;
    for (int64_t i = 0; i < rows * columns; ++i) {
      sums[i] += second[i];
      finite &= sums[i] - sums[i] == 0;
    }
    return finite;
  }

  void store(const float* sums, int64_t n, int64_t stop, const Batch& batch, int64_t from,
             int64_t to) const {
    const int64_t rows = stop - n;
    for (int64_t m = from; m < to; ++m) {
      auto* y = static_cast<BFloat16*>(d.y) + d.order[batch.begin + m] * d.sy + n;
      float column[kSplit];
      for (int64_t i = 0; i < rows; ++i) column[i] = sums[i * columns + m];
      for (int64_t i = 0; bias && i < rows; ++i) column[i] += to_float(bias[n + i]);
      for (int64_t i = 0; i < rows; ++i) from_float(column[i], y + i);
    }
  }
};

// One adapter for all tokens, of a rank that fills whole pieces.
template <class Pairs, class Rows = InMemory>
void decode_in_tiles(const Decode& d, const Rows& rows = {}) {
  int order[kTokens];
  for (int i = 0; i < d.m; ++i) order[i] = i;
  const int tokens = static_cast<int>(d.m);
  const int64_t stride = round_up(d.r, 16);
  const LoraPart part = {d.a, d.b, d.r, 0, d.n, d.sb, 0, stride, d.scale, 0, tokens, 0};
  const Batch batch = {0, tokens, 0, 1};
  const MultiLora call = {d.x, d.w, d.bias, d.y, d.m, d.k, d.n, d.sx, d.sw, d.sy, d.sa, order, &part,
                          &batch, 1, 1, d.m * stride, d.dtype, d.adapter_dtype};
  run_multi(TileCall<Pairs, Rows>(call, rows));
}

}  // namespace
}  // namespace fusedpeft::cpu
