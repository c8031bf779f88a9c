// SPDX-License-Identifier: Apache-2.0
// Rows of channels put into another order; cross_scan.cc drives them.
#pragma once
#include "scan/scan_kernels.h"

namespace pentad::scan {

// Rows of f32, [t][stride]: row index[t], or t where `index` is null, of `rows` belongs to element t
// of `x` (channel, t).
struct RowsJob {
  Strided x;
  float* rows;
  const int32_t* index;
  int64_t channels, count, stride;
};

// to[index[t]] of [count][stride] receives from[t] with `scatter`; else to[t] receives
// from[index[t]]. `add`: it is added to what is there. stride: whole vectors.
struct OrderJob {
  const float* from;
  float* to;
  const int32_t* index;
  int64_t count, stride;
  bool scatter, add;
};

}  // namespace pentad::scan
