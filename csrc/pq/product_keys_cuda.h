// SPDX-License-Identifier: Apache-2.0
// product_keys.h on a CUDA device, for float16, bfloat16 and float32: the same entries are selected,
// and results have the CPU's bits but for the last of an exponential. Gradients of sub-keys and values
// are sums of the same terms in runs of 128 entries (grouped_sum.cuh).
#pragma once
#include "common/cuda_stream.h"
#include "pq/product_keys.h"

namespace pentad::pq::cuda {

constexpr int64_t kMostEntries = 2048;  // k: lists of keys lie in shared memory

int64_t product_keys_scratch(int64_t rows, int64_t heads, int64_t keys, int64_t k);
void product_keys(const CudaStream& stream, const ProductKeys& in, const ProductKeysOut& out,
                  void* scratch);

// `places`: where each entry's row of d_values is, or null, which is its index; then `value_rows` are
// all values. grad.touched is not written.
int64_t product_keys_backward_scratch(int64_t rows, int64_t heads, int64_t keys, int64_t half,
                                      int64_t k, int64_t dv, int64_t value_rows);
void product_keys_backward(const CudaStream& stream, const ProductKeys& in,
                           const ProductKeysGrad& grad, const int64_t* places, int64_t value_rows,
                           void* scratch);

}  // namespace pentad::pq::cuda
