// SPDX-License-Identifier: Apache-2.0
// Recurrences with a matrix state and one decay per key, step by step: matrix_scan.h with
// key_decay.
#pragma once
#include "scan/matrix_scan.h"

namespace pentad::scan {

void matrix_steps_forward(const MatrixScan&, const Operand& out, const Operand& last,
                          float* stored);
void matrix_steps_backward(const MatrixScan&, const MatrixScanGradients&);

}  // namespace pentad::scan
