// SPDX-License-Identifier: Apache-2.0
// The inner kernels of product-key memory that exist once per instruction-set level
// (product_keys_simd.inc). product_keys.cc drives them.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::pq {

constexpr int64_t kSubkeyPad = 64;  // rows of scores are padded to a multiple of this

// Rows of an array with `columns` entries each, of any strides.
struct MemoryRows {
  const void* data;
  DType dtype;
  int64_t stride, column_stride, columns;
};

// out = sum_e weight[e] rows[index[e]], a chain over e < count. Indices up to `known` may be read,
// which belong to later calls: their rows are prefetched.
struct MemoryBagJob {
  MemoryRows rows;
  const int64_t* index;
  const float* weight;
  int64_t count, known;
  float* scratch;  // 2 columns
  void* out;
  DType out_dtype;
};

// accumulators[key][0, width) += coefficient * row: rows [0, count), each with `used[r]` entries
// from r * most of `keys` and `coefficients`.
struct SubkeyScatterJob {
  MemoryRows rows;
  int64_t count, most;
  const int32_t* used;
  const int32_t* keys;
  const float* coefficients;
  float* accumulators;  // [n][width]
  int64_t width;
};

// Entries (value row << 32 | entry), rising, against the value rows [first, last).
struct MemoryGradJob {
  const uint64_t* entries;
  int64_t count;
  int64_t first, last;
  MemoryRows values;
  const float* d_out;  // [groups][dv]
  uint32_t per_group;  // entries of each
  const float* weights;
  float* d_weights;  // += d_out . value; null: not wanted
  void* d_values;    // null: not wanted. Row `first`, or the first touched row
  int64_t* touched;  // null: dense, rows without entries become zero
  float* scratch;    // 2 dv
};

struct ProductKeysKernels {
  // One row to f32.
  void (*widen)(const void* row, DType dtype, int64_t stride, int64_t n, float* out);
  void (*narrow)(const float* row, int64_t n, DType dtype, void* out);
  // Keys (n, half) into panels f32 [padded n / w][half][w], w a register block's width.
  void (*pack_keys)(const MemoryRows& keys, int64_t n, float* panels, float* scratch);
  // scores[m][padded n] = the half scores of q[m][step].
  void (*half_scores)(const float* q, int64_t step, int64_t m, const float* panels, int64_t n,
                      int64_t half, float* scores);
  // The k <= n best of scores[padded n], which it overwrites, in order. scratch: int32
  // 7 * padded n + 3 * kSubkeyPad.
  void (*best_keys)(float* scores, int64_t n, int64_t k, int32_t* scratch, float* best,
                    int32_t* index);
  // The pairs (a[p], b[p]) that may be among the k largest of first[a] + second[b] go to `found`,
  // in order when `ordered` comes back true (no two rounded sums were equal); returns their number.
  // scratch: int32 4 * padded pairs + 4 * kSubkeyPad; found: padded pairs + kSubkeyPad.
  int64_t (*best_pairs)(const float* first, const float* second, const int32_t* a, const int32_t* b,
                        int64_t pairs, int64_t k, int32_t* scratch, int32_t* found, bool* ordered);
  void (*bag)(const MemoryBagJob&);
  void (*scatter)(const SubkeyScatterJob&);
  void (*value_gradients)(const MemoryGradJob&);
};

}  // namespace pentad::pq

// One table per level that is compiled in.
namespace pentad::v2 {
extern const pq::ProductKeysKernels pq_product_keys_kernels;
}
namespace pentad::v3 {
extern const pq::ProductKeysKernels pq_product_keys_kernels;
}
namespace pentad::v4 {
extern const pq::ProductKeysKernels pq_product_keys_kernels;
}
namespace pentad::v4x {
extern const pq::ProductKeysKernels pq_product_keys_kernels;
}
namespace pentad::neon {
extern const pq::ProductKeysKernels pq_product_keys_kernels;
}
