// SPDX-License-Identifier: Apache-2.0
#include "common/cuda_info.h"

namespace pentad {

bool cuda_built() { return false; }
bool cuda_on_host() { return true; }
std::vector<std::string> cuda_devices() { return {}; }

}  // namespace pentad
