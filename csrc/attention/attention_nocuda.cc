// SPDX-License-Identifier: Apache-2.0
// In place of attention_forward.cu and attention_backward.cu where no CUDA compiler was found.
#include "attention/attention_cuda.h"

namespace pentad::attention::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t scratch_bytes(int64_t) { missing(); }
void forward(const CudaStream&, const Problem&, const Packed&, const Outputs&, void*) { missing(); }
void backward(const CudaStream&, const Problem&, const Packed&, const Gradients&, void*) {
  missing();
}

}  // namespace pentad::attention::cuda
