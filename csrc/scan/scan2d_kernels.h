// SPDX-License-Identifier: Apache-2.0
// Rows of channels; cross_scan.cc drives them.
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

}  // namespace pentad::scan
