// SPDX-License-Identifier: Apache-2.0
// The kernels of recurrences with one decay per key (matrix_scan.h), step by step. Jobs are those
// of matrix_scan_kernels.h with a, da (h, t, n), q, k, dq, dk (h, t, n) too (heads of one group:
// apart by 0, dq and dk of each head their own), and perhaps some of the value columns; stored
// states have rows of `stored_row` floats.
#pragma once
#include <stdint.h>

#include "scan/matrix_scan_kernels.h"
#include "scan/scan_kernels.h"

namespace pentad::scan {

// Steps that a tile of the state stays in registers for: forward (8, 16 and 32 take the same time
// from cache; 64 is 10% slower from memory) and backward (8: +25%, 16: +10%, 64: as fast).
constexpr int64_t kStepsBlock = 16, kBackBlock = 32;
constexpr int64_t kStepsColumns = 64;  // value columns of the backward pass at a time

// Floats of scratch that a job needs, at any level.
static constexpr int64_t matrix_steps_scratch(int64_t heads, int64_t keys, int64_t values,
                                              bool backward) {
  const int64_t n = keys + kMaxLanes, p = values + kMaxLanes, c = kStepsColumns;
  if (!backward) return kStepsBlock * (3 * n + 2 * p) + p + heads * keys * p;
  const int64_t history = kBackBlock * 8 * kMaxLanes, arrays = 32 * kMaxLanes;
  return kMatrixChunk * (6 * n + 5 * c + 2) + n + c + keys * c + kMatrixChunk / kBackBlock * c * n +
         history + heads * (p + keys * p + p * n) + arrays;
}

}  // namespace pentad::scan
