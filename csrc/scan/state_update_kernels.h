// SPDX-License-Identifier: Apache-2.0
// What the kernel of the one-token state update is given; scan_kernels.h holds its table.
#pragma once
#include <stdint.h>

#include "scan/scan_kernels.h"

namespace pentad::scan {

// Rows of one sequence that share B and C: channels of a head, or heads of a group.
struct StateUpdateJob {
  int64_t rows, states;
  bool softplus;
  Strided state;       // (row, n)
  Strided a;           // (row, n), f32
  Strided b, c;        // (-, n)
  Strided x, dt, z;    // (row); z may be absent
  Strided d, dt_bias;  // (row), f32; may be absent
  Strided out;         // (row)
};

}  // namespace pentad::scan
