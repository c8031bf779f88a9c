// SPDX-License-Identifier: Apache-2.0
// The inner kernels of lookups that exist once per instruction-set level (lookup_simd.inc), as
// plain structs and function pointers. lookup.cc drives them: pieces, threads.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::pq {

enum class Combine : uint8_t { concat, sum, mean, product };

struct Table {
  const char* base;
  int64_t rows;
  int64_t step;  // bytes from one row to the next
};

// codes (rows, columns), strides in elements, to int32 [rows][columns].
struct CodesJob {
  const void* codes;
  DType dtype;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  const int64_t* sizes;  // of the tables
  bool same_size;        // all of them
  int32_t* index;
};

// out [rows][columns][row_bytes], copies; with scratch of at least a row, by way of that and past
// the caches.
struct GatherJob {
  const Table* tables;
  int64_t columns, rows, row_bytes;
  const int32_t* index;  // [rows][columns]
  char* out;
  char* scratch;
  int64_t scratch_bytes;
};

// out [outputs][width or columns * width] of dtype; bags[b] are rows of index and weights.
struct CombineJob {
  const Table* tables;
  DType dtype;
  int64_t columns, width;
  const int32_t* index;  // [rows][columns]
  const float* weights;  // [rows][columns]; null: 1
  const int64_t* bags;   // outputs + 1 boundaries; null: one row each
  int64_t fetched;       // rows of index, where the tables are too large for the cache, else 0
  int64_t outputs;
  Combine combine;
  char* out;
  float* scratch;  // [width]
};

// sums[c][index(i, c)][0..width) += factor(i, c) * grad row of i, for indices in [low[c], high[c]).
struct ScatterJob {
  const float* grad;
  int64_t grad_step, column_step;  // floats from one row, one column of codes to the next
  const int64_t* grad_rows;        // of each row; null: i
  int64_t rows, columns;
  const int32_t* index;  // [rows][columns]
  const float* factors;  // [rows][columns]; null: 1
  float* const* sums;    // per column
  int64_t step, width;
  const int32_t *low, *high;  // null: all
  bool fetches;               // sums ahead: they are too many for the cache
};

// out(i, c) = scale(i) * <grad of (i, c), tables[c][index(i, c)]>.
struct WeightGradientJob {
  const Table* tables;
  DType dtype;
  const float* grad;
  int64_t grad_step, column_step;
  const int64_t* grad_rows;
  int64_t rows, columns, width;
  const int32_t* index;
  const float* scales;  // [rows]; null: 1
  float* out;           // [rows][columns]
  float* scratch;       // [width]
};

// out [rows][columns][width] = grad row of i times the other terms of the row.
struct ProductGradientJob {
  const Table* tables;
  DType dtype;
  const float* grad;
  int64_t grad_step;
  const int64_t* grad_rows;
  int64_t rows, columns, width;
  const int32_t* index;
  const float* weights;
  float* out;
  float* scratch;  // [columns + 1][width]
};

struct LookupKernels {
  bool (*read_codes)(const CodesJob&);  // false: some code has no row
  void (*gather)(const GatherJob&);
  void (*combine)(const CombineJob&);
  void (*widen)(const void* row, DType dtype, int64_t stride, int64_t n, float* out);
  void (*scatter)(const ScatterJob&);
  void (*weight_gradient)(const WeightGradientJob&);
  void (*product_gradient)(const ProductGradientJob&);
};

}  // namespace pentad::pq

// One table per level that is compiled in.
namespace pentad::v2 {
extern const pq::LookupKernels pq_lookup_kernels;
}
namespace pentad::v3 {
extern const pq::LookupKernels pq_lookup_kernels;
}
namespace pentad::v4 {
extern const pq::LookupKernels pq_lookup_kernels;
}
namespace pentad::v4x {
extern const pq::LookupKernels pq_lookup_kernels;
}
namespace pentad::neon {
extern const pq::LookupKernels pq_lookup_kernels;
}
