// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of this family share: rows of codes in 16-byte pieces, keys of metrics.
#pragma once
#include "common/cuda_launch.cuh"
#include "common/topk.cuh"
#include "hamming/hamming_cuda.h"

namespace pentad::hamming::cuda {

struct Codes {
  const uint8_t* data;
  int64_t rows, row_stride, col_stride;
  int bytes;
  bool aligned;  // every piece is a whole, aligned uint4

  explicit Codes(const Matrix<const uint8_t>& m)
      : data(m.data),
        rows(m.rows),
        row_stride(m.row_stride),
        col_stride(m.col_stride),
        bytes(static_cast<int>(m.cols)),
        aligned(m.cols % 16 == 0 && m.col_stride == 1 && m.row_stride % 16 == 0 &&
                reinterpret_cast<uintptr_t>(m.data) % 16 == 0) {}

  __host__ __device__ int pieces() const { return (bytes + 15) / 16; }

  // Bytes [16 piece, 16 piece + 16) of a row; zeros past its end and past the last row.
  __device__ uint4 piece(int64_t row, int piece) const {
    uint4 out = {0, 0, 0, 0};
    const int first = piece * 16, count = bytes - first < 16 ? bytes - first : 16;
    if (row >= rows || count <= 0) return out;
    const uint8_t* from = data + row * row_stride + first * col_stride;
    if (aligned) return *reinterpret_cast<const uint4*>(from);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i < count) words[i / 4] |= static_cast<uint32_t>(from[i * col_stride]) << i % 4 * 8;
    out.x = words[0], out.y = words[1], out.z = words[2], out.w = words[3];
    return out;
  }
};

__device__ inline int ones_of(const uint4& x) {
  return __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w);
}

__device__ inline float jaccard_of(int both, int any) {
  return any ? __fdiv_rn(static_cast<float>(any - both), static_cast<float>(any)) : 0.0f;
}

// The sort key of a pair, smaller is better; `both` common ones, a_ones + b_ones in each.
__device__ inline uint32_t key_of(Metric metric, int both, int a_ones, int b_ones) {
  if (metric == Metric::hamming) return static_cast<uint32_t>(a_ones + b_ones - 2 * both);
  if (metric == Metric::intersection) return static_cast<uint32_t>(65534 - both);
  return device_key_from_float(jaccard_of(both, a_ones + b_ones - both));
}

// Tensor cores count bits from sm_80 to sm_90; later ones emulate it.
bool counts_on_tensor_cores(const CudaStream& stream, Product product);

// ones[i] = |row i|.
void count_ones(const CudaStream& stream, const Codes& codes, int32_t* ones);

}  // namespace pentad::hamming::cuda
