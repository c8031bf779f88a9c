// SPDX-License-Identifier: Apache-2.0
// What the kernel of the one-token update of matrix states is given; scan_kernels.h holds its
// table.
#pragma once
#include <stdint.h>

#include "scan/scan_kernels.h"

namespace pentad::scan {

constexpr int64_t kUpdateKeys = 1024;  // at most

// One head of one sequence. Null data: absent.
struct MatrixUpdateJob {
  int64_t keys, values;
  bool delta, key_decay;
  float scale;
  Strided state;  // channel: n, time: p
  Strided q, k;   // (n)
  Strided v, d;   // (p); d: f32
  Strided a, w;   // (n) or one number, one number: f32
  Strided out;    // (p)
};

}  // namespace pentad::scan
