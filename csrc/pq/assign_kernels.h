// SPDX-License-Identifier: Apache-2.0
// The inner kernels of pq/assign.h that exist once per instruction-set level (assign_simd.inc);
// assign.cc drives them. Lanes are rows: a tile of `tile_rows` rows is transposed, and each element
// of a centroid is broadcast against it.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::pq {

constexpr int kMostTileRows = 48;
constexpr int kMostGroup = 8;   // centroids that are scored together
constexpr int kAssignPad = 16;  // rows of scratch are padded to a multiple of this, with zeros

// One tile of x, in float32.
struct AssignPackJob {
  const void* x;  // f32, f16, bf16
  DType dtype;
  int64_t row_stride, col_stride;
  int rows;  // valid ones, 1..tile_rows; the others become zeros
  int64_t dim, padded;
  const float* centre;  // [padded]: mu, or zeros
  float* raw;           // [tile_rows][padded], the padding zero before
  float* centred;       // the same, raw - centre
  float* columns;       // [padded][tile_rows], centred and transposed
  float* squares;       // [tile_rows]: sum of squares of the centred row
};

// The centroids of one codebook, in groups: float [groups][dim][group], and minus the bias,
// [groups * group], -inf where there is no centroid.
struct AssignCentroids {
  const float* values;
  const float* bias;
  int64_t dim, groups;
};

// Per row of the tile: the best score, the second best, and the place of the best.
struct AssignScanJob {
  AssignCentroids centroids;
  const float* columns;
  int rows;
  float *best, *second;    // [tile_rows]
  int32_t* place;          // [tile_rows]
  float* third = nullptr;  // scan_rough alone
  int32_t* second_place = nullptr;
};

struct AssignKernels {
  int tile_rows;
  int group;
  bool (*pack)(const AssignPackJob&);  // whether all of x is finite
  // Over groups: the best score of a group counts, place is the group.
  void (*scan_groups)(const AssignScanJob&);
  // Over centroids: place is the centroid.
  void (*scan_each)(const AssignScanJob&);
  // Bit i of masks[r]: centroid i of group place[r] scores at least least[r]. rows [.][padded].
  void (*group_masks)(const AssignCentroids&, const float* rows, int64_t padded, int count,
                      const int32_t* place, const float* least, uint8_t* masks);
  // As scan_groups, with the third best and the place of the second, on pairs of bf16: `dim` counts
  // pairs. Null where the level has no such product.
  void (*scan_rough)(const AssignScanJob&);
  // Columns [dim] to bf16 pairs [ceil(dim / 2)], and the sum of squares of what that lost, per row.
  void (*round_columns)(const float* columns, int64_t dim, float* pairs, float* lost);
  // Scores of group `place` for one centred row: out[group].
  void (*group_scores)(const AssignCentroids&, int64_t place, const float* row, float* out);
  // All scores of one centred row: out[groups * group].
  void (*row_scores)(const AssignCentroids&, const float* row, float* out);
};

}  // namespace pentad::pq

// One table per level that is compiled in.
namespace pentad::v2 {
extern const pq::AssignKernels pq_assign_kernels;
}
namespace pentad::v3 {
extern const pq::AssignKernels pq_assign_kernels;
}
namespace pentad::v4 {
extern const pq::AssignKernels pq_assign_kernels;
}
namespace pentad::v4x {
extern const pq::AssignKernels pq_assign_kernels;
}
namespace pentad::neon {
extern const pq::AssignKernels pq_assign_kernels;
}
