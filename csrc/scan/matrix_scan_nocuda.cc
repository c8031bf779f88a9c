// SPDX-License-Identifier: Apache-2.0
// In place of the matrix_*.cu files of this folder where no CUDA compiler was found.
#include "scan/matrix_scan_cuda.h"

namespace pentad::scan::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t matrix_forward_scratch(const MatrixScan&, const Packed&, bool) { missing(); }
void matrix_forward(const CudaStream&, const MatrixScan&, const Packed&, const Operand&,
                    const Operand&, float*, void*) {
  missing();
}
int64_t matrix_backward_scratch(const MatrixScan&, const Packed&) { missing(); }
void matrix_backward(const CudaStream&, const MatrixScan&, const Packed&,
                     const MatrixScanGradients&, void*) {
  missing();
}
void matrix_update(const CudaStream&, const MatrixUpdate&, const Integers&, int64_t) { missing(); }

}  // namespace pentad::scan::cuda
