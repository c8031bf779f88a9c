// SPDX-License-Identifier: Apache-2.0
// The gradients of sum pooling, apart from those of max pooling for their length alone.
#pragma once
#include "sparse/splade_cuda.h"

namespace pentad::sparse::cuda {

int64_t splade_sum_scratch(const SpladeHead& head);
void splade_sum_backward(const CudaStream& stream, const SpladeHead& head,
                         const SpladeGradients& gradients, void* scratch);

}  // namespace pentad::sparse::cuda
