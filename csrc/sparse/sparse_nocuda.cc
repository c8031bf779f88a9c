// SPDX-License-Identifier: Apache-2.0
// In place of the *.cu files of this folder where no CUDA compiler was found.
#include "sparse/splade_cuda.h"

namespace pentad::sparse::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t splade_scratch(int64_t, int64_t) { missing(); }
void splade_head(const CudaStream&, const SpladeHead&, const SpladeOutputs&, void*) { missing(); }
int64_t splade_backward_scratch(const SpladeHead&) { missing(); }
void splade_head_backward(const CudaStream&, const SpladeHead&, const SpladeGradients&, void*) {
  missing();
}

}  // namespace pentad::sparse::cuda
