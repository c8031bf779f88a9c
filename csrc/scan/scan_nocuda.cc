// SPDX-License-Identifier: Apache-2.0
// In place of the *.cu files of scans with vector states where no CUDA compiler was found.
#include "scan/scan_cuda.h"

namespace pentad::scan::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t selective_scan_forward_scratch(int64_t, int64_t, int64_t, int64_t, bool, int64_t, bool,
                                       int64_t) {
  missing();
}
void selective_scan_forward(const CudaStream&, const SelectiveScan&, const Indices&, const Operand&,
                            const Operand&, float*, void*, int64_t) {
  missing();
}
int64_t selective_scan_backward_scratch(int64_t, int64_t, int64_t, int64_t, int64_t, bool, int64_t,
                                        bool, int64_t) {
  missing();
}
void selective_scan_backward(const CudaStream&, const SelectiveScan&, const Indices&,
                             const SelectiveScanGradients&, void*, int64_t) {
  missing();
}
void state_update(const CudaStream&, const StateUpdate&, const Indices&, int64_t) { missing(); }
void few_rows_linear(const CudaStream&, const FewRowsLinear&, const Operand&) { missing(); }
void recurrence_forward(const CudaStream&, const Recurrence&, const Operand&) { missing(); }
void recurrence_backward(const CudaStream&, const Recurrence&, const RecurrenceGradients&) {
  missing();
}
void causal_conv_forward(const CudaStream&, const CausalConv&, const Indices&, const Operand&,
                         const Operand&) {
  missing();
}
int64_t causal_conv_backward_scratch(int64_t, int64_t, int64_t, int64_t) { missing(); }
void causal_conv_backward(const CudaStream&, const CausalConv&, const Indices&,
                          const CausalConvGradients&, void*) {
  missing();
}
void causal_conv_update(const CudaStream&, const ConvUpdate&, const Indices&, const Indices&,
                        int64_t) {
  missing();
}

}  // namespace pentad::scan::cuda
