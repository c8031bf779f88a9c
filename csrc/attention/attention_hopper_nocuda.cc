// SPDX-License-Identifier: Apache-2.0
// In place of attention_hopper*.cu where no CUDA compiler was found.
#include "attention/attention_hopper.h"

namespace pentad::attention::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

bool hopper_wanted(int) { return false; }
void want_hopper(bool) {}
bool hopper_takes(const Problem&, const Outputs&) { return false; }
bool hopper_takes(const Problem&, const Gradients&) { return false; }
void hopper_forward(const CudaStream&, const Problem&, const Outputs&) { missing(); }
int64_t hopper_backward_scratch(const Problem&) { missing(); }
void hopper_backward(const CudaStream&, const Problem&, const Gradients&, void*) { missing(); }

}  // namespace pentad::attention::cuda
