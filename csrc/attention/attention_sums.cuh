// SPDX-License-Identifier: Apache-2.0
// What is known of each query's row once lse is there, and sums of its probabilities.
#pragma once
#include "attention/attention_tile.cuh"

namespace pentad::attention::cuda {

// Three numbers per row (b, h, i), each in an array of its own; Sequences::row_at says where. A
// probability is 2^(score - base - low); in a row that sees nothing low is infinite and so all are 0.
struct RowFacts {
  float *base, *low;  // lse in units of log2, and what its rounding to float left out
  float* delta;

  RowFacts(void* scratch, int64_t rows)
      : base(static_cast<float*>(scratch)), low(base + rows), delta(low + rows) {}
};

inline int64_t rows_of(const Problem& p, const Packed& packed) {
  return (packed.given() ? 1 : p.batch) * p.heads * p.max_q;
}

// Fills the facts; delta only where d_out is given: <d_out, out> + sum_j p_ij dmass_j - d_lse.
void row_facts(const CudaStream& stream, const Problem& p, const Packed& packed,
               const Gradients& given, const RowFacts& facts);

// mass (b, h, j) or (h, total): sum_i p_ij.
void key_mass(const CudaStream& stream, const Problem& p, const Packed& packed, const Operand& lse,
              float* mass, void* scratch);

// dsink (h): -sum exp(sink - lse) delta.
void sink_gradient(const CudaStream& stream, const Problem& p, const Packed& packed,
                   const RowFacts& facts, float* dsink);

// --- Of the kernels ---------------------------------------------------------------------------------

__device__ inline double read_real_at(const Operand& x, int64_t b, int64_t h, int64_t i) {
  const int64_t at = b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
  return x.dtype == DType::f64 ? static_cast<const double*>(x.data)[at]
                               : static_cast<const float*>(x.data)[at];
}
__device__ inline void write_real_at(const Operand& x, int64_t b, int64_t h, int64_t i, double y) {
  const int64_t at = b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
  if (x.dtype == DType::f64) static_cast<double*>(x.data)[at] = y;
  else static_cast<float*>(x.data)[at] = static_cast<float>(y);
}

}  // namespace pentad::attention::cuda
