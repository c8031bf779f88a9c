// SPDX-License-Identifier: Apache-2.0
// The two products of a block of decoding, scores = q k^T and o = alpha o + p v, for a few rows of
// queries and a tile of keys in shared memory: on tensor cores, or in float32 by lanes.
//
// p is -0 where a key is not seen, which adds nothing; p of seen keys is positive or NaN.
#pragma once
#include "attention/attention_mask.cuh"
#include "common/mma.cuh"

namespace pentad::attention::cuda {

constexpr int kLanes = 128;  // of a block

__device__ inline bool is_seen(float p) { return __float_as_uint(p) >> 31 == 0; }
__device__ inline bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000) != 0x7f800000;
}

// --- 16-bit floats ------------------------------------------------------------------------------------

__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                __half) {
  mma_f16(c, a, b);
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                __nv_bfloat16) {
  mma_bf16(c, a, b);
}

// One row of a tensor-core product is for one row of queries, so a group of up to 16 heads costs what
// one head does. A warp has a quarter of the keys, then a quarter of the columns of the values.
//
// q (16, dim), k (kKeys, dim), v (kKeys, value_dim), p (16, kKeys); row strides leave the accesses of
// a warp without bank conflicts: 8 bytes of 4 rows for q and k, 16 bytes of 8 rows for p and v.
template <class T, int kWidth>
struct TensorProducts {
  static constexpr int kRows = 16;
  static constexpr int kKeys = kWidth <= 128 ? 64 : 32;
  static constexpr int kKeyStride = kWidth + 16, kValueStride = kWidth + 8;
  static constexpr int kDimUnit = 16;         // q and k are zero from dim to a multiple of this
  static constexpr int kTiles = kWidth / 32;  // of 8 columns, of a warp

  float o[kTiles][4] = {};

  __device__ static void scores(const T* q, const T* k, int rows, int dim, float* s, int stride) {
    const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
    constexpr int kOfWarp = kKeys / 4;
    const int first = static_cast<int>(threadIdx.x) / 32 * kOfWarp;
    float c[kOfWarp / 8][4] = {};
    // The dimensions may come in any order, the same for both: 4 adjacent ones to a lane.
    for (int d = t * 4; d < dim; d += 16) {
      const auto pair = [&](const T* x, int row) {
        return *reinterpret_cast<const uint2*>(x + row * kKeyStride + d);
      };
      const uint2 low = pair(q, g), high = rows > 8 ? pair(q, g + 8) : uint2{0, 0};
      const uint32_t a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
      for (int n = 0; n < kOfWarp / 8; ++n) {
        const uint2 key = pair(k, first + n * 8 + g);
        const uint32_t b[2] = {key.x, key.y};
        multiply(c[n], a, b, T{});
      }
    }
#pragma unroll
    for (int n = 0; n < kOfWarp / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (g + i / 2 * 8 < rows)
          s[(g + i / 2 * 8) * stride + first + n * 8 + 2 * t + i % 2] = c[n][i];
  }

  __device__ static int column() { return static_cast<int>(threadIdx.x) / 32 * (kWidth / 4); }

  __device__ void scale(const float* alpha) {
    const int g = lane_of_warp() / 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[n][i] *= alpha[g + i / 2 * 8];
  }

  __device__ void values(const T* p, int stride, const T* v, int, int value_dim) {
    // Matrices of 8 by 8: of the rows or keys from 8 on for lanes 8 to 15 and 24 to 31, of the
    // columns from 8 on for the upper half of the warp.
    const int lane = lane_of_warp(), row = lane % 16, right = lane / 16 * 8;
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      uint32_t a[4];
      ldmatrix(a, p + row * stride + key + right);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        if (column() + n * 8 >= value_dim) break;
        uint32_t pairs[4];
        ldmatrix_transposed(pairs, v + (key + row) * kValueStride + column() + n * 8 + right);
        const uint32_t b[2][2] = {{pairs[0], pairs[1]}, {pairs[2], pairs[3]}};
        multiply(o[n], a, b[0], T{});
        multiply(o[n + 1], a, b[1], T{});
      }
    }
  }

  // o(row, column) for each of this lane's elements.
  template <class F>
  __device__ void each(const F& f) {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(o[n][i], g + i / 2 * 8, column() + n * 8 + 2 * t + i % 2);
  }
};

// --- float32 ------------------------------------------------------------------------------------------

// Eight lanes share a key's product, in pieces of 16 bytes; then a lane has a column of the values.
// Eight rows are as much as the multiply-adds keep up with memory.
template <int kWidth>
struct LaneProducts {
  static constexpr int kRows = 8;
  static constexpr int kKeys = kWidth <= 128 ? 32 : 16;
  static constexpr int kKeyStride = kWidth, kValueStride = kWidth;
  static constexpr int kDimUnit = 4;
  static constexpr int kColumns = kWidth <= kLanes ? 1 : kWidth / kLanes;

  float o[kRows][kColumns] = {};

  __device__ static void scores(const float* q, const float* k, int rows, int dim, float* s,
                                int stride) {
    const int tid = static_cast<int>(threadIdx.x), part = tid % 8;
#pragma unroll
    for (int key = tid / 8; key < kKeys; key += kLanes / 8) {
      float sum[kRows] = {};
      for (int d = part * 4; d < dim; d += 32) {
        const float4 x = *reinterpret_cast<const float4*>(k + key * kKeyStride + d);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          const float4 y = *reinterpret_cast<const float4*>(q + r * kKeyStride + d);
          sum[r] += x.x * y.x;
          sum[r] += x.y * y.y;
          sum[r] += x.z * y.z;
          sum[r] += x.w * y.w;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        for (int by = 4; by; by /= 2) sum[r] += __shfl_xor_sync(kFullWarp, sum[r], by);
        if (part == r) s[r * stride + key] = sum[r];
      }
    }
  }

  __device__ void scale(const float* alpha) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) o[r][c] *= alpha[r];
  }

  __device__ void values(const float* p, int stride, const float* v, int rows, int value_dim) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = static_cast<int>(threadIdx.x) + c * kLanes;
      if (column >= value_dim) break;
#pragma unroll
      for (int key = 0; key < kKeys; key += 4) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = v[(key + i) * kValueStride + column];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          const float4 y = *reinterpret_cast<const float4*>(p + r * stride + key);
          o[r][c] += y.x * x[0];
          o[r][c] += y.y * x[1];
          o[r][c] += y.z * x[2];
          o[r][c] += y.w * x[3];
        }
      }
    }
  }

  template <class F>
  __device__ void each(const F& f) {
    if (static_cast<int>(threadIdx.x) >= kWidth) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) f(o[r][c], r, static_cast<int>(threadIdx.x) + c * kLanes);
  }
};

template <class T, int kWidth>
struct ProductsOf {
  using type = TensorProducts<T, kWidth>;
};
template <int kWidth>
struct ProductsOf<float, kWidth> {
  using type = LaneProducts<kWidth>;
};

}  // namespace pentad::attention::cuda
