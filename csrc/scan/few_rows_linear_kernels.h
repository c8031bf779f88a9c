// SPDX-License-Identifier: Apache-2.0
// What the kernels of the projections of a step are given; scan_kernels.h holds their table.
#pragma once
#include <stdint.h>

#include "scan/scan_kernels.h"

namespace pentad::scan {

// x (row, i) to floats [rows][step], zeros past the last input.
struct FewRowsInputs {
  int64_t rows, inputs, step;
  Strided x;
  float* out;
};

// All rows of x by some rows of the weight.
struct FewRowsJob {
  int64_t rows, inputs, outputs, step;
  const float* x;  // [rows][step], zeros up to a whole vector
  Strided weight;  // (o, i), time 1
  Strided bias;    // (o); may be absent
  Strided out;     // (r, o)
};

}  // namespace pentad::scan
