// SPDX-License-Identifier: Apache-2.0
// Tiles of floats in shared memory, and their products on tensor cores.
//
// A product of floats is three products of tf32 numbers, which have 11 bits: x = high + low, and
// x y = high high + high low + low high, right to about 2^-21. That keeps the results of float32
// (and what 16-bit inputs give in it: they are tf32 numbers) at twice to three times the speed of
// the float32 units.
//
// A block is four warps; each has 16 of the 64 rows of a result, and all its columns. Rows of a tile
// are padded so that a fragment's loads meet 32 banks: by 4 where they run along the rows (kAlong), by
// 8 where they run down the columns (kDown).
#pragma once
#include "common/mma.cuh"
#include "scan/scan.h"

namespace pentad::scan::cuda {

constexpr int kLanes = 128;
constexpr int kTile = 64;  // rows of a tile, and columns unless said otherwise
constexpr int kAlong = 68, kDown = 72;
constexpr int kWarpRows = 16;

// --- Elements of any dtype ------------------------------------------------------------------------

__device__ inline float number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}
__device__ inline void put_number(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(x); break;
    case DType::f16: static_cast<__half*>(data)[i] = __float2half(x); break;
    default: static_cast<float*>(data)[i] = x;
  }
}

// Rows and columns of an array, from element `first` on; null: absent.
struct Source {
  const void* data;
  DType dtype;
  int64_t first, row, column;

  __device__ float operator()(int64_t i, int64_t c) const {
    return number(data, dtype, first + i * row + c * column);
  }
};
struct Target {
  void* data;
  DType dtype;
  int64_t first, row, column;

  __device__ void put(int64_t i, int64_t c, float x) const {
    put_number(data, dtype, first + i * row + c * column, x);
  }
};

__device__ inline bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// --- Loads ----------------------------------------------------------------------------------------

// tile[i][c] = factor[i] x(i, c), or without a factor x(i, c), in rows [0, rows) and columns
// [0, columns), and zeros in the rest of (kTile, kColumns). Returns whether this lane has seen a
// number that is not finite.
template <int kColumns>
__device__ inline bool load_tile(const Source& x, int64_t rows, int64_t columns,
                                 const float* factor, float* tile, int step) {
  bool strange = false;
  const int tid = static_cast<int>(threadIdx.x);
  const int bytes = x.dtype == DType::f32 ? 16 : 8;
  const bool fours = x.column == 1 && x.row % 4 == 0 &&
                     (reinterpret_cast<uintptr_t>(x.data) + x.first * (bytes / 4)) % bytes == 0;
#pragma unroll 4
  for (int at = tid; at < kTile * kColumns / 4; at += kLanes) {
    const int i = at / (kColumns / 4), c = at % (kColumns / 4) * 4;
    float values[4] = {};
    if (x.data && i < rows) {
      const int64_t from = x.first + i * x.row + c * x.column;
      if (fours && c + 4 <= columns) {
        if (x.dtype == DType::f32) {
          const float4 four =
              *reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + from);
          values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else {
          const uint64_t bits =
              *reinterpret_cast<const uint64_t*>(static_cast<const uint16_t*>(x.data) + from);
          uint16_t four[4];
          memcpy(four, &bits, sizeof bits);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            values[e] = number(four, x.dtype == DType::bf16 ? DType::bf16 : DType::f16, e);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (c + e < columns) values[e] = number(x.data, x.dtype, from + e * x.column);
      }
      const float times = factor ? factor[i] : 1.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (factor && c + e < columns) values[e] *= times;
        strange |= !is_finite(values[e]);
      }
    }
    *reinterpret_cast<float4*>(tile + i * step + c) =
        float4{values[0], values[1], values[2], values[3]};
  }
  return strange;
}

// --- Products -------------------------------------------------------------------------------------

// This lane's part of a result (64, kColumns).
template <int kColumns>
using Sums = float[kColumns / 8][4];

// f(row, column, element of this lane).
template <int kColumns, class F>
__device__ inline void each(float (&sums)[kColumns / 8][4], const F& f) {
  const int lane = lane_of_warp();
  const int row = static_cast<int>(threadIdx.x) / 32 * kWarpRows + lane / 4;
#pragma unroll
  for (int b = 0; b < kColumns / 8; ++b)
#pragma unroll
    for (int e = 0; e < 4; ++e) f(row + e / 2 * 8, b * 8 + lane % 4 * 2 + e % 2, sums[b][e]);
}

struct Parts {
  uint32_t high, low;
};
__device__ inline Parts parts_of(float x) {
  const uint32_t bits = __float_as_uint(x), high = (bits + 0x1000) & 0xffffe000;
  // Infinity has no rest.
  return {high, bits == high ? 0 : __float_as_uint(x - __uint_as_float(high))};
}

// The part of a product that is not zeros: all up to 64, or the most that there may be.
struct Extent {
  int64_t rows, inner, columns;
};

// sums += a b, of a (64, 64) and b (64, kColumns). A tile lies as it is written here, [row][step], or
// as its transpose. `kFinite`: numbers of b that are not finite count as zeros.
template <int kColumns, bool kTransposedA, bool kTransposedB, bool kFinite = false>
__device__ inline void add_product(const float* a, int a_step, const float* b, int b_step,
                                   float (&sums)[kColumns / 8][4], const Extent& extent) {
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
  const int first = static_cast<int>(threadIdx.x) / 32 * kWarpRows, row = first + g;
  const int inner = static_cast<int>(min(extent.inner, int64_t{kTile}));
  const int columns = static_cast<int>(min(extent.columns, int64_t{kColumns}));
  if (first >= extent.rows) return;
#pragma unroll 2
  for (int k = 0; k < inner; k += 8) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = row + e % 2 * 8, j = k + t + e / 2 * 4;
      const Parts x = parts_of(kTransposedA ? a[j * a_step + i] : a[i * a_step + j]);
      high[e] = x.high, low[e] = x.low;
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (n * 8 >= columns) continue;
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = k + t + e * 4, j = n * 8 + g;
        float y = kTransposedB ? b[j * b_step + i] : b[i * b_step + j];
        if (kFinite && !is_finite(y)) y = 0.0f;
        const Parts x = parts_of(y);
        b_high[e] = x.high, b_low[e] = x.low;
      }
      mma_tf32(sums[n], low, b_high);
      mma_tf32(sums[n], high, b_low);
      mma_tf32(sums[n], high, b_high);
    }
  }
}

// sums += a b, of a lower triangle a (64, 64), zeros above it. Where b is `strange`, holds numbers
// that are not finite, these do not meet the zeros: they reach no earlier row, whose bits they leave
// as they are.
template <int kColumns>
__device__ inline void add_lower(const float* a, int a_step, const float* b, int b_step,
                                 bool strange, float (&sums)[kColumns / 8][4],
                                 const Extent& extent) {
  if (!strange) return add_product<kColumns, false, false>(a, a_step, b, b_step, sums, extent);
  add_product<kColumns, false, false, true>(a, a_step, b, b_step, sums, extent);
  each<kColumns>(sums, [&](int i, int c, float& sum) {
    for (int j = 0; j <= i; ++j)
      if (!is_finite(b[j * b_step + c])) sum += a[i * a_step + j] * b[j * b_step + c];
  });
}

// The sum over a row's columns, to each of the four lanes that have parts of it.
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

}  // namespace pentad::scan::cuda
