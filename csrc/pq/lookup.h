// SPDX-License-Identifier: Apache-2.0
// Rows of tables, gathered by codes and combined.
//
//   tables   M of them, table m has rows_m rows of `width` floats (float16, bfloat16, float32, float64)
//   codes    (n, M) integers of any kind, codes(i, m) in [0, rows_m)
//   weights  (n, M) or absent, which is 1
//   bags     boundaries b_0 = 0 <= b_1 <= ... <= b_B = n, or absent: every row for itself
//
//   term(i, m) = weight(i, m) * tables[m][codes(i, m)]
//   concat    out(b) = [sum_i term(i, 0), ..., sum_i term(i, M - 1)]     (B, M * width)
//   sum       out(b) = sum_i sum_m term(i, m)                            (B, width)
//   mean      the sum, divided by (b_{k+1} - b_k) * M                    (B, width)
//   product   out(b) = sum_i prod_m term(i, m)                           (B, width)
//
// i runs over the rows of bag b; an empty bag gives zeros. Everything is in float32 (double for
// float64 tables), product and addition rounded separately, in this order, so the bits depend
// neither on the level nor on the number of threads: error at most (rows of the bag) * M + 1
// roundings of the sum of magnitudes. Without weights and bags, concat copies.
//
// Gradients, with g the gradient of out and s = 1, or 1 / (M * rows of the bag) for the mean:
//   rest(i, m)      = prod_{j != m} term(i, j) for product, else 1: exact also where a factor is 0
//   d_tables[m][k]  = sum of weight(i, m) * s * g(b) * rest(i, m) over i with codes(i, m) = k, rising i
//   d_weights(i, m) = <s * g(b) * rest(i, m), tables[m][codes(i, m)]>
// The inner product is 16 interleaved sums, added in a tree.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"
#include "pq/lookup_kernels.h"

namespace pentad::pq {

constexpr int64_t kMostTableRows = (int64_t{1} << 31) - 1;

// (n, columns) integers, of any strides (in elements).
struct Codes {
  const void* data = nullptr;
  DType dtype = DType::u8;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 0;
};

// `base` and `step` of a table count bytes and its columns follow each other.
struct Lookup {
  const char* op = "pq.lookup";
  Codes codes;
  std::vector<Table> tables;
  int64_t width = 0;
  DType dtype = DType::f32;
  const void* weights = nullptr;
  DType weights_dtype = DType::f32;
  int64_t weight_row_stride = 0, weight_stride = 0;
  const int64_t* bags = nullptr;
  int64_t bag_count = 0;
  Combine combine = Combine::concat;

  int64_t subspaces() const { return codes.columns; }
  int64_t outputs() const { return bags ? bag_count : codes.rows; }
  int64_t out_width() const { return combine == Combine::concat ? subspaces() * width : width; }
};

// Either may be null. d_tables: the tables one below the other, (sum of rows, width), float32 (or
// float64 beside float64 tables); d_weights (n, M) the same.
struct LookupGradients {
  const void* d_out;
  DType dtype;
  int64_t row_stride;  // of d_out, in elements; its columns follow each other
  void* d_tables;
  void* d_weights;
};

// out (outputs, out_width), contiguous, of the tables' dtype. Throws std::invalid_argument for a
// code without a row; out is then undefined.
void lookup(const Lookup& problem, void* out);
void lookup_backward(const Lookup& problem, const LookupGradients& gradients);

// The definitions, plain loops; float64 tables end here.
void reference_lookup(const Lookup& problem, void* out);
void reference_lookup_backward(const Lookup& problem, const LookupGradients& gradients);

// The table of the level in use.
const LookupKernels& lookup_kernels();
// One code; -1 for what is negative or beyond every table.
int64_t read_code(const Codes& codes, int64_t row, int64_t column);
// Throws for the first code, in order, that is none of [0, sizes[m]); returns if there is none.
void refuse_codes(const char* op, const Codes& codes, const int64_t* sizes);

}  // namespace pentad::pq
