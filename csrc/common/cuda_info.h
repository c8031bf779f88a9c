// SPDX-License-Identifier: Apache-2.0
// Whether CUDA kernels are compiled in, and what they could run on. cuda_info.cu is built where a
// CUDA compiler is found, cuda_info_nocuda.cc elsewhere: the pattern for every CUDA source here.
#pragma once
#include <string>
#include <vector>

namespace pentad {

bool cuda_built();
// Names of the visible devices; empty without a driver or a device.
std::vector<std::string> cuda_devices();

}  // namespace pentad
