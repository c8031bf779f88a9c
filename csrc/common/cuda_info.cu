// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "common/cuda_info.h"

namespace pentad {

bool cuda_built() { return true; }
bool cuda_on_host() { return false; }

std::vector<std::string> cuda_devices() {
  std::vector<std::string> names;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver, no device: an answer, not an error
    return names;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess) names.push_back(properties.name);
  }
  return names;
}

}  // namespace pentad
