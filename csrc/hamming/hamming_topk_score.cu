// SPDX-License-Identifier: Apache-2.0
// The k rows with the largest scores, without the matrix of scores.
#include "hamming/hamming_lists.cuh"
#include "hamming/hamming_score.cuh"

namespace pentad::hamming::cuda {
namespace {

constexpr int kQueries = 2;  // of a block
constexpr int kRows = 4;     // of a lane
constexpr int kStep = kScoreLanes * kRows;
constexpr int64_t kBlocks = 1024;     // that keep a device busy
constexpr int64_t kSliceRows = 4096;  // at least, so that filling the tables is little

// x (nq, dim), codes (rows, bytes) -> lists (nq, slices, k).
// Limit: shared memory (add_scores).
__global__ void __launch_bounds__(kScoreLanes, 2)
    topk_score_kernel(Search in, Matrix<const float> x) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t slice = blockIdx.x % in.slices, q_first = blockIdx.x / in.slices * kQueries;
  Shared shared;
  ScoreTable* tables = shared.take<ScoreTable>(kQueries);
  const Lists lists(shared, kQueries, in.capacity);
  if (tid < kQueries) lists.list(in, tid).clear();
  const bool whole = in.codes.bytes <= kScoreBytes;
  if (whole) fill_tables<kQueries>(x, q_first, 0, tables);
  __syncthreads();

  const int64_t first = slice * in.slice_rows;
  const int64_t last = min(first + in.slice_rows, in.codes.rows);
  for (int64_t step = first; step < last; step += kStep) {
    int64_t rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = step + r * kScoreLanes + tid;
    float sums[kQueries][kRows] = {};
    add_scores(x, q_first, in.codes, rows, tables, whole, sums);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!in.may_return(rows[r], last)) continue;
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
        if (q_first + q < x.rows)
          lists.list(in, q).offer(hit_of(~device_key_from_float(sums[q][r]), rows[r]));
    }
    __syncthreads();
    for (int q = 0; q < kQueries; ++q)
      if (lists.counts[q] + kStep > in.capacity) lists.list(in, q).shrink(WholeBlock());
    __syncthreads();  // the counts have been looked at before anybody offers
  }
  for (int q = 0; q < kQueries; ++q)
    write_list(WholeBlock(), lists.list(in, q), in, q_first + q, slice);
}

int64_t slices_of(int64_t nq, int64_t rows, int64_t k) {
  const int64_t most = min(kBlocks / ceil_div(nq, kQueries), kMostHits / k);
  return max(int64_t{1}, min(most, ceil_div(rows, kSliceRows)));
}

}  // namespace

int64_t topk_score_scratch(int64_t nq, int64_t rows, int64_t k) {
  return nq == 0 || k == 0 ? 0 : lists_scratch(nq, slices_of(nq, rows, k), k);
}

void topk_score(const CudaStream& stream, const Matrix<const float>& x,
                const Matrix<const uint8_t>& codes, const uint8_t* mask, int64_t k, float* values,
                int64_t* ids, void* scratch) {
  if (x.rows == 0 || k == 0) return;
  const int64_t slices = slices_of(x.rows, codes.rows, k);
  const Search in{Codes(codes),
                  mask,
                  x.rows,
                  static_cast<int>(k),
                  power_of_two_from(k + kStep),
                  slices,
                  ceil_div(ceil_div(codes.rows, slices), kStep) * kStep,
                  static_cast<uint64_t*>(scratch)};
  const Grid grid{blocks_of(ceil_div(x.rows, kQueries) * slices), kScoreLanes,
                  shared_bytes<ScoreTable>(kQueries) + Lists::bytes(kQueries, in.capacity)};
  launch(stream, "hamming: topk_score", topk_score_kernel, grid, in, x);
  merge_lists(stream, in, {Value::score, values, ids});
}

}  // namespace pentad::hamming::cuda
