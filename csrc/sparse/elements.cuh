// SPDX-License-Identifier: Apache-2.0
// Numbers of the three widths that kernels of this family take, and rows of them.
#pragma once
#include "common/cp_async.cuh"

namespace pentad::sparse::cuda {

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrowed(float x);
template <>
__device__ inline float narrowed<float>(float x) {
  return x;
}
template <>
__device__ inline __half narrowed<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

constexpr int64_t kNowhere =
    INT64_MIN;  // the offset of a row that is not there; others have any sign

// Rows of `dim` numbers somewhere in memory, each given by the offset of its first one.
template <class T>
struct Operand {
  static constexpr int kPiece = 16 / sizeof(T);

  const T* data;
  int64_t col_stride, dim;
  bool aligned;  // whether pieces of 16 bytes may be read at once

  // Numbers [at, at + kPiece) of the row; 0 past its end, and where there is no row.
  __device__ void copy_piece(int64_t row, int64_t at, uint4* to) const {
    if (row == kNowhere || at >= dim) {
      *to = uint4{0, 0, 0, 0};
    } else if (aligned) {
      cp_async(to, data + row + at, static_cast<int>(min(dim - at, int64_t{kPiece}) * sizeof(T)));
    } else {
      alignas(16) T piece[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i)
        piece[i] = at + i < dim ? data[row + (at + i) * col_stride] : narrowed<T>(0.0f);
      *to = *reinterpret_cast<const uint4*>(piece);
    }
  }

  // Numbers [at, at + 8), at a multiple of 8, in float; 0 past the end.
  __device__ void read_eight(int64_t row, int64_t at, float (&x)[8]) const {
    if (aligned && at + 8 <= dim) {
      alignas(16) T piece[8];
#pragma unroll
      for (int i = 0; i < 8 / kPiece; ++i)
        reinterpret_cast<uint4*>(piece)[i] = reinterpret_cast<const uint4*>(data + row + at)[i];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = widened(piece[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[i] = at + i < dim ? widened(data[row + (at + i) * col_stride]) : 0.0f;
    }
  }
};

// Whether rows at these strides begin on multiples of 16 bytes and run through memory.
template <class T>
bool is_aligned(const void* data, int64_t col_stride, std::initializer_list<int64_t> row_strides) {
  bool fits = col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t stride : row_strides) fits = fits && stride * sizeof(T) % 16 == 0;
  return fits;
}

}  // namespace pentad::sparse::cuda
