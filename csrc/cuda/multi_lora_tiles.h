// How the blocks of multi_lora.cu multiply their rows of W by their tokens.
//
// A tile is [kRows of W, kTokens]. The kStream warps have its rows in groups, and kShares of K; each
// share leaves its sums in a plane [kTokens, kRows] of shared memory. W and x go straight into
// registers, x of the other groups of rows out of the L1, which W bypasses. The loop has no barrier.
#pragma once

#include "cuda/device.h"
#include "cuda/multi_lora.h"

namespace fusedpeft::cuda {
namespace {

constexpr int kStream = 4, kAdapter = 2;  // warps of a block that stream W, that add the adapters
constexpr int kThreads = (kStream + kAdapter) * kWarp;

constexpr int kFlags = 3;  // producers done; consumers that have seen it; sums of later splits done

struct Args : MultiLora {
  unsigned* flags;  // kFlags, zero before the launch and after it
  int producers;    // the first blocks, which compute s
  int token_tiles;  // side by side, before the next rows
  int64_t tiles;    // blocks of each split of K
  bool aligned;     // rows of x, W, A and B are whole pieces of 16 bytes
};

// What a block multiplies: `rows` of W from `row` on, `local` within their part; tokens from `token`
// on; of K [begin, end), which is split number `split`.
struct Place {
  int64_t row, local;
  int rows, part, token, begin, end, split;
};

// Between the tokens of a plane, so that the lanes of an mma write to banks of their own.
template <int kRows>
constexpr int kPlaneStride = kRows + 4;

// Tensor cores, for 16-bit numbers in whole pieces. The order of k within 32 is free as long as W and
// x have the same: so a lane takes 8 neighbours of a row in one load, and they serve as the two pairs
// of columns of two mma. The next step's loads are under way while one is multiplied. A warp
// has kRowTiles times 16 rows and kGroups times 8 tokens; a step kSpans times 32 of K.
template <class T, int kRowTiles, int kRowGroups, int kGroups, int kSpans>
struct MmaTile {
  static constexpr int kRows = 16 * kRowTiles * kRowGroups, kTokens = 8 * kGroups;
  static constexpr int kShares = kStream / kRowGroups;

  static __device__ void run(const Args& a, const Place& place, float* planes) {
    constexpr int kStep = 32 * kSpans * kShares, kStride = kPlaneStride<kRows>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4;
    const int first = warp % kRowGroups * 16 * kRowTiles, share = warp / kRowGroups;
    const int column = share * 32 * kSpans + lane % 4 * 8;
    const T* w[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h)  // rows past the end read the last one again
        w[r][h] = static_cast<const T*>(a.w) + column +
                  (place.row + min(first + 16 * r + 8 * h + group, place.rows - 1)) * a.sw;
    const T* x = static_cast<const T*>(a.x) + column;
    const int64_t token = place.token + group;

    constexpr int kAhead = kGroups < 4 ? kGroups : 4;  // groups of tokens, for want of registers
    uint4 now[kSpans][kRowTiles][2], next[kSpans][kRowTiles][2], xs[kAhead][kSpans];
    const auto fetch_w = [&](uint4(&v)[kSpans][kRowTiles][2], int k) {
#pragma unroll
      for (int p = 0; p < kSpans; ++p)
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            v[p][r][h] =
                column + k + 32 * p < place.end ? load_once(w[r][h] + k + 32 * p) : uint4{0, 0, 0, 0};
    };
    const auto fetch_x = [&](uint4(&v)[kSpans], int j, int k) {
#pragma unroll
      for (int p = 0; p < kSpans; ++p)
        v[p] = token + 8 * j < a.m && column + k + 32 * p < place.end
                   ? *reinterpret_cast<const uint4*>(x + (token + 8 * j) * a.sx + k + 32 * p)
                   : uint4{0, 0, 0, 0};
    };

    float acc[kRowTiles][kGroups][4] = {};
    fetch_w(now, place.begin);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) fetch_x(xs[j], j, place.begin);
#pragma unroll 1
    for (int k = place.begin; k < place.end; k += kStep) {
      fetch_w(next, k + kStep);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int p = 0; p < kSpans; ++p)
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            const uint4 upper = now[p][r][0], lower = now[p][r][1], v = xs[j % kAhead][p];
            mma<T>(acc[r][j], {upper.x, lower.x, upper.y, lower.y}, {v.x, v.y});
            mma<T>(acc[r][j], {upper.z, lower.z, upper.w, lower.w}, {v.z, v.w});
          }
        const int ahead = j + kAhead;
        fetch_x(xs[j % kAhead], ahead % kGroups, ahead < kGroups ? k : k + kStep);
      }
#pragma unroll
      for (int p = 0; p < kSpans; ++p)
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) now[p][r][h] = next[p][r][h];
    }

    float* plane = planes + share * kTokens * kStride + first;
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          plane[(8 * j + lane % 4 * 2 + i % 2) * kStride + 16 * r + 8 * (i / 2) + group] = acc[r][j][i];
  }
};

// FMA, for fp32 and for what is not in whole pieces, which is loaded number by number.
template <class T>
struct FmaTile {
  static constexpr int kRows = 8, kTokens = 8, kShares = kStream;

  template <int N>
  static __device__ void step(const T* (&w)[kRows], const T* (&x)[kTokens], int k,
                              float (&sums)[kRows][kTokens]) {
    Vec<T, N> ws[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (N == 1)
        ws[i].v[0] = w[i][k];
      else
        ws[i] = load<N>(w[i] + k);
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      Vec<T, N> xs;
      if constexpr (N == 1)
        xs.v[0] = x[j][k];
      else
        xs = load<N>(x[j] + k);
#pragma unroll
      for (int e = 0; e < N; ++e)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          sums[i][j] += to_float(ws[i].v[e]) * to_float(xs.v[e]);
    }
  }

  static __device__ void run(const Args& a, const Place& place, float* planes) {
    constexpr int kStride = kPlaneStride<kRows>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const T *w[kRows], *x[kTokens];  // rows and tokens past the end read the last one again
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      w[i] = static_cast<const T*>(a.w) + (place.row + min(i, place.rows - 1)) * a.sw;
#pragma unroll
    for (int j = 0; j < kTokens; ++j)
      x[j] = static_cast<const T*>(a.x) + min(place.token + j, a.m - 1) * a.sx;
    float sums[kRows][kTokens] = {};
    bool pieces = false;
    if constexpr (sizeof(T) == 4) {
      pieces = a.aligned;
      if (pieces)
#pragma unroll 1
        for (int k = place.begin + threadIdx.x * 4; k < place.end; k += kStream * kWarp * 4)
          step<4>(w, x, k, sums);
    }
    if (!pieces)
#pragma unroll 1
      for (int k = place.begin + threadIdx.x; k < place.end; k += kStream * kWarp)
        step<1>(w, x, k, sums);
    float* plane = planes + warp * kTokens * kStride;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        float sum = sums[i][j];  // warp_sums would have nvcc keep the array in memory
#pragma unroll
        for (int bit = kWarp / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
        if (lane == 0) plane[j * kStride + i] = sum;
      }
  }
};

}  // namespace
}  // namespace fusedpeft::cuda
