// SPDX-License-Identifier: Apache-2.0
// Where a CUDA kernel runs, for code that is compiled without CUDA's headers too.
#pragma once
#include <stdexcept>

namespace pentad {

// `stream` is a cudaStream_t of the device; null is its default stream.
struct CudaStream {
  int device = 0;
  void* stream = nullptr;
};

// No such device, no kernels for it, or a refusal of its runtime; pentad.DeviceError in Python.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace pentad
