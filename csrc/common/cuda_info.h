// SPDX-License-Identifier: Apache-2.0
// Whether CUDA kernels are compiled in, and what they could run on. cuda_info.cu is built where a
// CUDA compiler is found, cuda_info_nocuda.cc elsewhere: the pattern for every CUDA source here.
// cuda_host/cuda_info_host.cc is for the build that executes the kernels on the CPU.
#pragma once
#include <string>
#include <vector>

namespace pentad {

bool cuda_built();
// Whether this build runs the CUDA kernels on the CPU, in place of the CPU's own: for their tests.
bool cuda_on_host();
// Names of the visible devices; empty without a driver or a device.
std::vector<std::string> cuda_devices();

}  // namespace pentad
