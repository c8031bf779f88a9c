// SPDX-License-Identifier: Apache-2.0
// The entries of splade.h that run on a CUDA device, for float16, bfloat16 and float32: the same
// mathematics on arrays in the device's memory. They put kernels on the stream and return; scratch
// memory comes from the caller, at least as many bytes as the function beside says, aligned to 16.
//
// Nothing on the host sees what arrays hold: a sequence whose mask has other numbers than 0 and 1
// gives NaN, and a place outside the sequence no gradient. 16-bit arguments are multiplied as they
// are, with float32 sums; the slopes of sum pooling are rounded to their type before the products of
// the gradients. Results do not depend on anything but the shapes.
#pragma once
#include "common/cuda_stream.h"
#include "sparse/splade.h"

namespace pentad::sparse::cuda {

int64_t splade_scratch(int64_t batch, int64_t length);
void splade_head(const CudaStream& stream, const SpladeHead& head, const SpladeOutputs& outputs,
                 void* scratch);

int64_t splade_backward_scratch(const SpladeHead& head);
void splade_head_backward(const CudaStream& stream, const SpladeHead& head,
                          const SpladeGradients& gradients, void* scratch);

}  // namespace pentad::sparse::cuda
