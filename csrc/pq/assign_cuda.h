// SPDX-License-Identifier: Apache-2.0
// assign.h on a CUDA device, for float16, bfloat16 and float32: the same codes and distances.
// Kernels are put on the stream; nothing is allocated or waited for. NaN and infinity are not looked
// for: the code of such a row, or in such a codebook, is any.
#pragma once
#include "common/cuda_stream.h"
#include "pq/assign.h"

namespace pentad::pq::cuda {

// n rows, M codebooks of K centroids.
int64_t assign_scratch(int64_t n, int64_t books, int64_t centroids, int64_t dim, int64_t top);
void assign(const CudaStream& stream, const Array3& x, const Array3& codebooks, Nearest metric,
            const Assigned& out, void* scratch);

}  // namespace pentad::pq::cuda
