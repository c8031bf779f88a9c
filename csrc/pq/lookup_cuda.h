// SPDX-License-Identifier: Apache-2.0
// Lookups and sums of table entries (lookup.h, table_sum.h) on a CUDA device: the same mathematics
// on arrays in the device's memory, for float16, bfloat16 and float32. Kernels are put on the stream;
// nothing is allocated or waited for. Scratch memory comes from the caller, as many bytes as the
// function beside says, aligned to 16. pq_nocuda.cc stands in where no CUDA compiler was.
//
// Results of lookup and table_sum have the bits of the CPU, and so have gradients of weights.
// Gradients of tables are sums of the same terms, in runs of 128 sorted codes.
//
// Contents are not looked at beforehand, which would take a wait: a code without a row gives NaN
// and has no gradient, and offsets are brought into [0, rows].
#pragma once
#include "common/cuda_stream.h"
#include "pq/lookup.h"
#include "pq/table_sum.h"

namespace pentad::pq::cuda {

// `offsets`: where bags begin, one column of int32 or int64, or null; the problem's own bags are not
// read. Columns of a table follow each other.
int64_t lookup_scratch(int64_t subspaces);
void lookup(const CudaStream& stream, const Lookup& problem, const Codes* offsets, void* out,
            void* scratch);

// `rows` are those of all tables.
int64_t lookup_backward_scratch(int64_t codes, int64_t subspaces, int64_t rows, int64_t width,
                                bool d_tables);
void lookup_backward(const CudaStream& stream, const Lookup& problem, const Codes* offsets,
                     const LookupGradients& gradients, void* scratch);

// float32 alone.
void score_tables(const CudaStream& stream, const ScoreTables& problem, float* tables);
void table_sum(const CudaStream& stream, const float* tables, int64_t queries, int64_t levels,
               const Codes& codes, float* out);
int64_t table_sum_backward_scratch(int64_t codes, int64_t subspaces, int64_t queries,
                                   int64_t levels);
void table_sum_backward(const CudaStream& stream, const float* d_out, int64_t row_stride,
                        int64_t stride, int64_t queries, int64_t levels, const Codes& codes,
                        float* d_tables, void* scratch);

}  // namespace pentad::pq::cuda
