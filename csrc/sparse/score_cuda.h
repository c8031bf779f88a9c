// SPDX-License-Identifier: Apache-2.0
// The entries of score.h and select.h that run on a CUDA device, on arrays in its memory. They put
// kernels on the stream and return; scratch memory comes from the caller, at least as many bytes as
// the function beside says, aligned to 16.
//
// Rows are in the one form of csr.h with terms in [0, columns), which the caller sees to. Where they
// are not, results are undefined, but nothing outside the arrays is touched. Scores have the bits of
// the CPU; gradients are double sums over rising rows of the other side, or rising pairs.
#pragma once
#include "common/cuda_stream.h"
#include "sparse/score.h"
#include "sparse/select.h"

namespace pentad::sparse::cuda {

// out (nq, n), float32 as all here.
int64_t score_scratch(int64_t queries, int64_t columns);
void score(const CudaStream& stream, const Rows<float>& queries, const Rows<float>& docs,
           int64_t columns, float* out, void* scratch);

// d_out (nq, n), contiguous; either gradient may be null.
int64_t score_backward_scratch(int64_t queries, int64_t docs, int64_t query_entries,
                               int64_t doc_entries, int64_t columns);
void score_backward(const CudaStream& stream, const Rows<float>& queries, const Rows<float>& docs,
                    int64_t columns, const float* d_out, float* d_queries, float* d_docs,
                    void* scratch);

// A pair of rows that do not exist scores NaN.
void score_pairs(const CudaStream& stream, const Rows<float>& queries, const Rows<float>& docs,
                 const Pairs& pairs, float* out);

// Pairs by a row of theirs: those of row r are order[starts[r], starts[r + 1]), rising.
struct PairsOfRows {
  const int64_t* starts;  // (rows + 1)
  const int64_t* order;   // (count)
  const int64_t* other;   // (count), the row of the other side of each pair
  int64_t count;
};
// The gradient of one side's values, out (side.nnz).
void score_pairs_backward(const CudaStream& stream, const Rows<float>& side,
                          const Rows<float>& other, const PairsOfRows& pairs, const float* d_out,
                          float* out);

// As in select.h, for float16, bfloat16 and float32. Of indices, values and out (n, d) any may be null.
void select_topk(const CudaStream& stream, const FloatRows& x, int64_t k, bool absolute,
                 void* indices, DType index_dtype, void* values, void* out);

}  // namespace pentad::sparse::cuda
