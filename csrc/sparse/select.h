// SPDX-License-Identifier: Apache-2.0
// The k largest of each row.
//
//   x        (n, d) floats (float16, bfloat16, float32, float64) of any strides
//   kept(i)  the first min(k, d) columns of row i in the order (x(i, j) falling, j rising), or
//            (|x(i, j)| falling, j rising); a NaN is larger than all, both zeros are equal
//
//   indices(i)  kept(i) in rising order         (n, min(k, d))
//   values(i)   x(i, kept(i))                   (n, min(k, d))
//   sparse(i)   x(i, j) on kept(i), else 0      (n, d)
//
// Numbers are compared as integers of their own width and copied as they are, so nothing rounds.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace pentad::sparse {

// Strides count elements.
struct FloatRows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;
};

// indices int32 or int64; values of x's dtype, or null. All contiguous, k <= columns.
void select_topk(const FloatRows& x, int64_t k, bool absolute, void* indices, DType index_dtype,
                 void* values);
// out (n, d) of x's dtype, contiguous.
void sparsify_topk(const FloatRows& x, int64_t k, bool absolute, void* out);

}  // namespace pentad::sparse
