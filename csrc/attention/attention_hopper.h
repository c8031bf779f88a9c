// SPDX-License-Identifier: Apache-2.0
// Attention for Hopper (sm_90a): the plain problem, at the speed of its tensor cores. What it does not
// take goes to the kernels for every architecture.
#pragma once
#include "attention/attention.h"
#include "common/cuda_stream.h"

namespace pentad::attention::cuda {

// Whether attention goes this way on this device, where it can: if the process asked for it, until a
// device has run these kernels.
bool hopper_wanted(int device);
void want_hopper(bool wanted);

// Dense bf16 or fp16 sequences with head dimensions 64 or 128, full, causal or in a window, any
// grouping of heads; rows of 16 aligned bytes. No key mass, bias, cap, slopes, sink, dropout or mask.
bool hopper_takes(const Problem& p, const Outputs& to);
bool hopper_takes(const Problem& p, const Gradients& g);

// Error budget: products are exact and summed in fp32, p and ds are rounded to the inputs' type before
// they meet values, keys and queries. Not as on the CPU: a NaN or an infinity reaches every query of
// a tile (128) that has it among its keys, seen or not.
void hopper_forward(const CudaStream& stream, const Problem& p, const Outputs& to);

// The gradients of both passes have one order of sums: those of keys and values go through the queries,
// those of queries through the keys, and what both need is computed twice.
int64_t hopper_backward_scratch(const Problem& p);
void hopper_backward(const CudaStream& stream, const Problem& p, const Gradients& g, void* scratch);

}  // namespace pentad::attention::cuda
