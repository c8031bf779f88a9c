// SPDX-License-Identifier: Apache-2.0
// Every family's kernels for level v4x. See common/simd.inc for why nothing else belongs here.
#include "isa/headers.h"

namespace pentad::v4x {
#include "common/simd.inc"
#include "common/convert.inc"
#include "common/functions.inc"
#include "common/gemm.inc"
#include "attention/attention_simd.inc"
#include "hamming/hamming_simd.inc"
#include "scan/scan_simd.inc"
}  // namespace pentad::v4x
