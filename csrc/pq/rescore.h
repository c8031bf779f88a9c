// SPDX-License-Identifier: Apache-2.0
// Scores of listed rows by their stored vectors.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace pentad::pq {

// vectors (rows, dim) int8 with scale (rows), or float16 without, contiguous; x (nq, cols) with
// cols <= dim; candidates (nq, c) row numbers -> out (nq, c), contiguous. With v the stored vector
// in float32 (int8: scale * integer, rounded), columns j < cols:
//
//   l2: sum_j (x_j - v_j)^2, +inf for a negative candidate      else: sum_j x_j v_j, -inf
//
// in double, nothing fused: eight sums, of the columns j = 0, 1, ... 7 mod 8 in rising order, which
// are then added in that order. So the bits are the same at every level, in registers of any width.
struct Stored {
  const void* vectors;
  DType dtype;
  const float* scale;
  int64_t dim;
};
void rescore(const Matrix<const float>& x, const Stored& stored, const int64_t* candidates,
             int64_t c, bool l2, float* out);

}  // namespace pentad::pq
