// SPDX-License-Identifier: Apache-2.0
// Every family's kernels for level neon. See common/simd.inc for why nothing else belongs here.
#include "isa/headers.h"

namespace pentad::neon {
#include "common/simd.inc"
#include "common/convert.inc"
#include "common/functions.inc"
#include "common/gemm.inc"
#include "attention/attention_simd.inc"
#include "hamming/hamming_simd.inc"
#include "scan/scan_simd.inc"
}  // namespace pentad::neon
