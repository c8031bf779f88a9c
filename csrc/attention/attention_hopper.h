// SPDX-License-Identifier: Apache-2.0
// Forward attention for Hopper (sm_90a): the plain problem, at the speed of its tensor cores. What it
// does not take goes to the kernels for every architecture.
#pragma once
#include "attention/attention.h"
#include "common/cuda_stream.h"

namespace pentad::attention::cuda {

// Dense bf16 or fp16 sequences with head dimensions 64 or 128, full, causal or in a window, any
// grouping of heads; rows of 16 aligned bytes. No key mass, bias, cap, slopes, sink, dropout or mask.
bool hopper_takes(const Problem& p, const Outputs& to);

// Error budget: products are exact and summed in fp32, p is rounded to the inputs' type before it
// meets the values. Not as on the CPU: a NaN or an infinity among the values reaches every query of
// a tile (128) that sees one of the tile's 128 keys.
void hopper_forward(const CudaStream& stream, const Problem& p, const Outputs& to);

}  // namespace pentad::attention::cuda
