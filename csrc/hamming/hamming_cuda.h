// SPDX-License-Identifier: Apache-2.0
// The entries of hamming.h that run on a CUDA device: the same mathematics, results and ties, on
// arrays in the device's memory. They put kernels on the stream and return; nothing is allocated,
// copied to the host or waited for. Scratch memory comes from the caller, at least as many bytes as
// the function beside says, aligned to 16. hamming_nocuda.cc stands in where no CUDA compiler was.
//
// Integers are exact and score has the bits of the CPU; weighted_sum adds runs of 64 codes, then the
// runs of a slice, then the slices, which are cut by n alone.
#pragma once
#include <cstdint>

#include "common/cuda_stream.h"
#include "hamming/hamming.h"

namespace pentad::hamming::cuda {

constexpr int64_t kMaxK = 2048;                    // lists of hits lie in shared memory
constexpr int64_t kMaxRows = int64_t{0xffffffff};  // a row is 32 bits of a hit, and one is "none"

// How common ones are counted: tensor cores, which sm_80 to sm_90 have for bits, or popcounts.
enum class Product { of_device, tensor, popcount };

int64_t distance_scratch(int64_t a_rows, int64_t b_rows);
void distance(const CudaStream& stream, const Matrix<const uint8_t>& a,
              const Matrix<const uint8_t>& b, Metric metric, void* out, void* scratch,
              Product product = Product::of_device);

// k <= kMaxK, codes.rows <= kMaxRows; mask may be null.
int64_t topk_scratch(int64_t queries, int64_t rows, int64_t k);
void topk(const CudaStream& stream, const Matrix<const uint8_t>& queries,
          const Matrix<const uint8_t>& codes, const uint8_t* mask, Metric metric, int64_t k,
          void* values, int64_t* ids, void* scratch, Product product = Product::of_device);

// Of the rows of some lists alone, list l being [borders[l], borders[l + 1]): query q visits
// probes[q * count ...], each list once. A row's id, of which ties take the smaller and the mask is
// asked, is ids_of[row] < kMaxRows.
struct Visits {
  const int64_t* probes;  // (queries, count)
  int64_t count, lists;
  const int64_t* borders;  // (lists + 1), rising
  const int64_t* ids_of;   // (codes.rows), each number below that once
};
// There is at least one list, and a query visits at least one.
int64_t topk_lists_scratch(int64_t queries, int64_t count, int64_t rows, int64_t lists, int64_t k);
void topk_lists(const CudaStream& stream, const Matrix<const uint8_t>& queries,
                const Matrix<const uint8_t>& codes, const Visits& visits, const uint8_t* mask,
                Metric metric, int64_t k, void* values, int64_t* ids, void* scratch);

// In two steps, as the caller has to know how much there is: what lies under `limit` (radius_limit)
// is counted into indptr (queries + 1), then values and ids (total = indptr[queries]) are written,
// ids rising in each query's run. Both take the same arguments and the same scratch memory.
int64_t range_scratch(int64_t queries, int64_t rows);
void range_count(const CudaStream& stream, const Matrix<const uint8_t>& queries,
                 const Matrix<const uint8_t>& codes, const uint8_t* mask, Metric metric,
                 uint32_t limit, int64_t* indptr, void* scratch,
                 Product product = Product::of_device);
void range_write(const CudaStream& stream, const Matrix<const uint8_t>& queries,
                 const Matrix<const uint8_t>& codes, const uint8_t* mask, Metric metric,
                 uint32_t limit, int64_t total, void* values, int64_t* ids, void* scratch,
                 Product product = Product::of_device);

void score(const CudaStream& stream, const Matrix<const float>& x,
           const Matrix<const uint8_t>& codes, float* out);
// k <= kMaxK, codes.rows <= kMaxRows; mask may be null. The scores of NaNs come first.
int64_t topk_score_scratch(int64_t queries, int64_t rows, int64_t k);
void topk_score(const CudaStream& stream, const Matrix<const float>& x,
                const Matrix<const uint8_t>& codes, const uint8_t* mask, int64_t k, float* values,
                int64_t* ids, void* scratch);

// candidates (x.rows, c) -> out (x.rows, c); what is no row scores -inf.
void score_candidates(const CudaStream& stream, const Matrix<const float>& x,
                      const Matrix<const uint8_t>& codes, const int64_t* candidates, int64_t c,
                      float* out);
// vectors (n, x.cols) int8 or float16; scale (n) or null.
void dot_candidates(const CudaStream& stream, const Matrix<const float>& x, const void* vectors,
                    DType dtype, const float* scale, int64_t n, const int64_t* candidates,
                    int64_t c, float* out);

int64_t weighted_sum_scratch(int64_t batch, int64_t nq, int64_t n, int64_t dim);
void weighted_sum(const CudaStream& stream, const WeightedSum& in, float* out, void* scratch);

// Arrays of any rank and strides; the results are contiguous. *nan, unless it is null, becomes 1
// where x holds one.
void pack(const CudaStream& stream, const TensorView& x, double threshold, uint8_t* codes,
          int32_t* nan);
void unpack(const CudaStream& stream, const TensorView& codes, int64_t dim, DType dtype, void* out);
void permute(const CudaStream& stream, const TensorView& codes, int64_t dim, int64_t shift,
             uint8_t* out);

}  // namespace pentad::hamming::cuda
