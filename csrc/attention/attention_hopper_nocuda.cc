// SPDX-License-Identifier: Apache-2.0
// In place of attention_hopper.cu where no CUDA compiler was found.
#include "attention/attention_hopper.h"

namespace pentad::attention::cuda {

bool hopper_takes(const Problem&, const Outputs&) { return false; }
void hopper_forward(const CudaStream&, const Problem&, const Outputs&) {
  throw DeviceError("this build of pentad has no CUDA kernels");
}

}  // namespace pentad::attention::cuda
