// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "pq/code_scan_kernels.h"

namespace pentad::pq {

// The table of the level in use.
const CodeScanKernels& code_scan_kernels();

}  // namespace pentad::pq
