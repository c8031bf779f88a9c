// SPDX-License-Identifier: Apache-2.0
// The two products of a tile: rows by rows, and weights by rows. 16-bit floats on tensor cores, float32
// on the FMA units, with the same elements in the same lanes. With g = lane / 4 and t = lane % 4,
//
//   c[m][n][r]: row 16 m + 8 (r / 2) + g, column 8 n + 2 t + r % 2
#pragma once
#include "attention/attention_mask.cuh"
#include "common/mma.cuh"

namespace pentad::attention::cuda {

// Elements between two rows of a tile: 16 bytes more than a row, so that neither ldmatrix nor the
// reads of float4 have bank conflicts.
template <class T>
__host__ __device__ constexpr int pitch_of(int columns) {
  return columns + static_cast<int>(16 / sizeof(T));
}

template <int kM, int kN>
__device__ void clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) c[m][n][r] = 0.0f;
}

__device__ inline uint32_t pack(float low, float high, const __nv_bfloat16*) {
  return pack_bf16(low, high);
}
__device__ inline uint32_t pack(float low, float high, const __half*) {
  return pack_f16(low, high);
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           const __nv_bfloat16*) {
  mma_bf16(c, a, b);
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           const __half*) {
  mma_f16(c, a, b);
}

// c (16 kM, 8 kN) += a (16 kM, kDim) b^T (8 kN, kDim), both rows in shared memory; columns from
// `dim` on are zero. Limit: tensor cores, or the shared memory that they read.
template <int kDim, int kM, int kN, class T>
__device__ void multiply_rows(float (&c)[kM][kN][4], const T* a, const T* b, int dim) {
  constexpr int kPitch = pitch_of<T>(kDim);
  const int lane = lane_of_warp();
  a += lane % 16 * kPitch + lane / 16 * 8;
  b += (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll 1
  for (int k = 0; k < dim; k += 64) {
#pragma unroll
    for (int step = 0; step < 64; step += 16) {
      uint32_t fa[kM][4], fb[4];
#pragma unroll
      for (int m = 0; m < kM; ++m) ldmatrix(fa[m], a + m * 16 * kPitch + k + step);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        ldmatrix(fb, b + n * 8 * kPitch + k + step);
        const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma(c[m][n], fa[m], b0, b);
          mma(c[m][n + 1], fa[m], b1, b);
        }
      }
    }
  }
}

// The same of float32. Limit: FMA units; a load of 16 bytes serves 8 (a) or 2 kM (b) of them.
template <int kDim, int kM, int kN>
__device__ void multiply_rows(float (&c)[kM][kN][4], const float* a, const float* b, int dim) {
  constexpr int kPitch = pitch_of<float>(kDim);
  const int lane = lane_of_warp();
  a += lane / 4 * kPitch;
  b += lane % 4 * 2 * kPitch;
#pragma unroll 2
  for (int k = 0; k < dim; k += 4) {
    float4 rows[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i)
      rows[i] = *reinterpret_cast<const float4*>(a + i * 8 * kPitch + k);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 y = *reinterpret_cast<const float4*>(b + (n * 8 + r) * kPitch + k);
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) {
          float& sum = c[i / 2][n][i % 2 * 2 + r];
          sum = fmaf(rows[i].x, y.x, sum);
          sum = fmaf(rows[i].y, y.y, sum);
          sum = fmaf(rows[i].z, y.z, sum);
          sum = fmaf(rows[i].w, y.w, sum);
        }
      }
  }
}

// o (16 kM, 8 kN) += p (16 kM, 8 kP) b (8 kP, 8 kN): p in registers, rounded to T; b in shared memory.
template <int kM, int kN, int kP, class T>
__device__ void multiply_weights(float (&o)[kM][kN][4], const float (&p)[kM][kP][4], const T* b,
                                 int pitch) {
  const int lane = lane_of_warp();
  b += lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kP; k += 2) {
    uint32_t fa[kM][4], fb[4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        fa[m][i] = pack(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1], b);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      ldmatrix_transposed(fb, b + k * 8 * pitch + n * 8);
      const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma(o[m][n], fa[m], b0, b);
        mma(o[m][n + 1], fa[m], b1, b);
      }
    }
  }
}

// The same of float32: a row's weights go around its four lanes.
template <int kM, int kN, int kP>
__device__ void multiply_weights(float (&o)[kM][kN][4], const float (&p)[kM][kP][4], const float* b,
                                 int pitch) {
  const int lane = lane_of_warp();
  b += lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < kP; ++k)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float w[2 * kM];
#pragma unroll
      for (int m = 0; m < 2 * kM; ++m)
        w[m] = __shfl_sync(kFullWarp, p[m / 2][k][m % 2 * 2 + i % 2], i / 2, 4);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 y = *reinterpret_cast<const float2*>(b + (k * 8 + i) * pitch + n * 8);
#pragma unroll
        for (int m = 0; m < 2 * kM; ++m) {
          o[m / 2][n][m % 2 * 2] = fmaf(w[m], y.x, o[m / 2][n][m % 2 * 2]);
          o[m / 2][n][m % 2 * 2 + 1] = fmaf(w[m], y.y, o[m / 2][n][m % 2 * 2 + 1]);
        }
      }
    }
}

// The same where b holds NaN or infinities, which rows that do not see them must not meet.
// Limit: latency; a tile like that is rare.
template <int kM, int kN, int kP, class T>
__device__ void multiply_seen(float (&o)[kM][kN][4], const float (&p)[kM][kP][4], uint64_t seen,
                              const T* b, int pitch) {
  const int lane = lane_of_warp();
#pragma unroll 1
  for (int i = 0; i < 8 * kP; ++i) {
    float own[kM][4] = {};
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int k = 0; k < kP; ++k)
        if (k == i / 8)
#pragma unroll
          for (int r = 0; r < 4; ++r) own[m][r] = p[m][k][r];
#pragma unroll
    for (int m = 0; m < 2 * kM; ++m) {
      const int half = m % 2 * 2;
      const float w =
          __shfl_sync(kFullWarp, i % 2 ? own[m / 2][half + 1] : own[m / 2][half], i / 2 % 4, 4);
      const int bit = (m / 2 * kP + i / 8) * 4 + half + i % 2;
      const int meets = __shfl_sync(kFullWarp, static_cast<int>(seen >> bit & 1), i / 2 % 4, 4);
      if (!meets) continue;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float y = to_float(b[i * pitch + n * 8 + lane % 4 * 2 + r]);
          o[m / 2][n][half + r] = fmaf(w, y, o[m / 2][n][half + r]);
        }
    }
  }
}

// Whether a tile holds NaN or an infinity; for all lanes of the block, with a barrier.
template <int kRows, int kColumns, int kLanes, class T>
__device__ bool not_finite(const T* tile) {
  constexpr int kPitch = pitch_of<T>(kColumns);
  bool found = false;
  for (int n = static_cast<int>(threadIdx.x); n < kRows * kColumns; n += kLanes)
    found = found || !(fabsf(to_float(tile[n / kColumns * kPitch + n % kColumns])) < infinity());
  return __syncthreads_or(found);
}

}  // namespace pentad::attention::cuda
