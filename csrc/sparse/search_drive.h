// SPDX-License-Identifier: Apache-2.0
// The kernels of the level in use.
#pragma once
#include "sparse/search_kernels.h"

namespace pentad::sparse {

const SearchKernels& search_kernels();

}  // namespace pentad::sparse
