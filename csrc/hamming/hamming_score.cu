// SPDX-License-Identifier: Apache-2.0
// Float queries by bits, of all rows or of some; and the transpose.
#include "hamming/hamming_score.cuh"

namespace pentad::hamming::cuda {
namespace {

// --- score ------------------------------------------------------------------------------------------

constexpr int kScoreQueries = 2;  // of a block: their tables are 32 KB of shared memory
constexpr int kScoreRows = 4;     // of a lane
constexpr int kRowsOfBlock = kScoreLanes * kScoreRows;

// x (nq, dim) float32, codes (n, bytes) -> out (nq, n).
// Limit: shared memory (add_scores).
__global__ void __launch_bounds__(kScoreLanes)
    score_kernel(Matrix<const float> x, Codes codes, int64_t row_blocks, float* out) {
  const int64_t q_first = blockIdx.x / row_blocks * kScoreQueries;
  int64_t rows[kScoreRows];
  for (int r = 0; r < kScoreRows; ++r)
    rows[r] = blockIdx.x % row_blocks * kRowsOfBlock + r * kScoreLanes + threadIdx.x;
  Shared shared;
  float sums[kScoreQueries][kScoreRows] = {};
  add_scores(x, q_first, codes, rows, shared.take<ScoreTable>(kScoreQueries), false, sums);
#pragma unroll
  for (int q = 0; q < kScoreQueries; ++q)
#pragma unroll
    for (int r = 0; r < kScoreRows; ++r)
      if (q_first + q < x.rows && rows[r] < codes.rows)
        out[(q_first + q) * codes.rows + rows[r]] = sums[q][r];
}

// --- score_candidates, dot_candidates ---------------------------------------------------------------

// x (nq, dim), codes (n, bytes), candidates (nq, c): rows, or -1 -> out (nq, c).
// Limit: memory, rows that lie apart.
__global__ void __launch_bounds__(kScoreLanes)
    score_candidates_kernel(Matrix<const float> x, Codes codes, const int64_t* candidates,
                            int64_t c, int64_t c_blocks, float* out) {
  const int64_t q = blockIdx.x / c_blocks, i = blockIdx.x % c_blocks * kScoreLanes + threadIdx.x;
  const int64_t row = i < c ? candidates[q * c + i] : -1;
  const bool known = row >= 0 && row < codes.rows;
  const int64_t rows[1] = {known ? row : codes.rows};
  Shared shared;
  float sums[1][1] = {};
  add_scores(x, q, codes, rows, shared.take<ScoreTable>(1), false, sums);
  if (i < c) out[q * c + i] = known ? sums[0][0] : -__uint_as_float(0x7f800000u);
}

__device__ inline float wide(int8_t x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }

// x (nq, dim), vectors (n, dim), scale (n) or null, candidates (nq, c) -> out (nq, c).
// Limit: memory, rows that lie apart. A warp has a candidate.
template <class T>
__global__ void __launch_bounds__(kScoreLanes)
    dot_candidates_kernel(Matrix<const float> x, const T* vectors, const float* scale, int64_t n,
                          const int64_t* candidates, int64_t c, float* out) {
  const int64_t i = (int64_t{blockIdx.x} * kScoreLanes + threadIdx.x) / 32;
  if (i >= x.rows * c) return;
  const int64_t row = candidates[i];
  if (row < 0 || row >= n) {
    if (lane_of_warp() == 0) out[i] = -__uint_as_float(0x7f800000u);
    return;
  }
  const float* query = x.data + i / c * x.row_stride;
  float sum = 0;
#pragma unroll 4
  for (int64_t j = lane_of_warp(); j < x.cols; j += 32)
    sum += query[j * x.col_stride] * wide(vectors[row * x.cols + j]);
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(kFullWarp, sum, by);
  if (lane_of_warp() == 0) out[i] = scale ? sum * scale[row] : sum;
}

// --- weighted_sum -----------------------------------------------------------------------------------

constexpr int kSumLanes = 256;  // one dimension each
constexpr int kQueries = 8;     // of a block
constexpr int kRun = 64;        // codes, as on the CPU
constexpr int64_t kMostSlices = 64;

int64_t slices_of(int64_t n) { return max(int64_t{1}, min(kMostSlices, ceil_div(n, 16 * kRun))); }

struct SumTask {
  WeightedSum in;
  int64_t slices, slice_codes, q_tiles, dim_tiles;
  float* out;  // (slices, batch, nq, dim)
};

// weights (batch, nq, n), codes (batch, n, bytes) -> out (slices, batch, nq, dim).
// Limit: additions, one per bit and query; the codes come from the caches after the first query.
__global__ void __launch_bounds__(kSumLanes) weighted_sum_kernel(SumTask task) {
  const WeightedSum& in = task.in;
  int64_t block = blockIdx.x;
  const int64_t dim = block % task.dim_tiles * kSumLanes + threadIdx.x;
  const int64_t q_first = (block /= task.dim_tiles) % task.q_tiles * kQueries;
  const int64_t batch = (block /= task.q_tiles) % in.batch, slice = block / in.batch;
  const int64_t first = slice * task.slice_codes;
  const int64_t last = min(first + task.slice_codes, in.n);
  Shared shared;
  auto* weights = shared.take<float[kQueries]>(kRun);
  const bool inside = dim < in.dim;
  const uint8_t* codes = in.codes + batch * in.code_strides[0] + dim / 8 * in.code_strides[2];
  const int shift = static_cast<int>(7 - dim % 8);
  float sums[kQueries] = {};
  for (int64_t n0 = first; n0 < last; n0 += kRun) {
    const int count = static_cast<int>(min(int64_t{kRun}, last - n0));
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRun * kQueries; i += kSumLanes) {
      const int64_t q = q_first + i / kRun, n = n0 + i % kRun;
      weights[i % kRun][i / kRun] =
          q < in.nq && n < last ? in.weights[batch * in.weight_strides[0] +
                                             q * in.weight_strides[1] + n * in.weight_strides[2]]
                                : 0.0f;
    }
    __syncthreads();
    if (!inside) continue;
    float run[kQueries] = {};
    for (int i = 0; i < count; ++i) {
      const bool set = codes[(n0 + i) * in.code_strides[1]] >> shift & 1;
#pragma unroll
      for (int q = 0; q < kQueries; ++q) run[q] += set ? weights[i][q] : -weights[i][q];
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) sums[q] += run[q];
  }
  if (!inside) return;
#pragma unroll
  for (int q = 0; q < kQueries; ++q)
    if (q_first + q < in.nq)
      task.out[((slice * in.batch + batch) * in.nq + q_first + q) * in.dim + dim] = sums[q];
}

// parts (slices, size) -> out (size), added in their order.
// Limit: memory, 4 bytes per part.
__global__ void __launch_bounds__(kSumLanes)
    add_slices(const float* parts, int64_t slices, int64_t size, float* out) {
  const int64_t i = int64_t{blockIdx.x} * kSumLanes + threadIdx.x;
  if (i >= size) return;
  float sum = parts[i];
  for (int64_t s = 1; s < slices; ++s) sum += parts[s * size + i];
  out[i] = sum;
}

}  // namespace

void score(const CudaStream& stream, const Matrix<const float>& x,
           const Matrix<const uint8_t>& codes, float* out) {
  if (x.rows == 0 || codes.rows == 0) return;
  const int64_t row_blocks = ceil_div(codes.rows, kRowsOfBlock);
  const Grid grid{blocks_of(row_blocks * ceil_div(x.rows, kScoreQueries)), kScoreLanes,
                  shared_bytes<ScoreTable>(kScoreQueries)};
  launch(stream, "hamming: score", score_kernel, grid, x, Codes(codes), row_blocks, out);
}

void score_candidates(const CudaStream& stream, const Matrix<const float>& x,
                      const Matrix<const uint8_t>& codes, const int64_t* candidates, int64_t c,
                      float* out) {
  if (x.rows * c == 0) return;
  const int64_t c_blocks = ceil_div(c, kScoreLanes);
  const Grid grid{blocks_of(x.rows * c_blocks), kScoreLanes, shared_bytes<ScoreTable>(1)};
  launch(stream, "hamming: score_candidates", score_candidates_kernel, grid, x, Codes(codes),
         candidates, c, c_blocks, out);
}

void dot_candidates(const CudaStream& stream, const Matrix<const float>& x, const void* vectors,
                    DType dtype, const float* scale, int64_t n, const int64_t* candidates,
                    int64_t c, float* out) {
  if (x.rows * c == 0) return;
  const Grid grid{blocks_of(ceil_div(x.rows * c * 32, kScoreLanes)), kScoreLanes};
  if (dtype == DType::i8)
    launch(stream, "hamming: dot_candidates", dot_candidates_kernel<int8_t>, grid, x,
           static_cast<const int8_t*>(vectors), scale, n, candidates, c, out);
  else
    launch(stream, "hamming: dot_candidates", dot_candidates_kernel<__half>, grid, x,
           static_cast<const __half*>(vectors), scale, n, candidates, c, out);
}

int64_t weighted_sum_scratch(int64_t batch, int64_t nq, int64_t n, int64_t dim) {
  const int64_t slices = slices_of(n);
  return slices > 1 ? slices * batch * nq * dim * 4 : 0;
}

void weighted_sum(const CudaStream& stream, const WeightedSum& in, float* out, void* scratch) {
  const int64_t size = in.batch * in.nq * in.dim;
  if (size == 0) return;
  SumTask task;
  task.in = in;
  task.slices = slices_of(in.n);
  task.slice_codes = ceil_div(ceil_div(in.n, task.slices), kRun) * kRun;
  task.q_tiles = ceil_div(in.nq, kQueries);
  task.dim_tiles = ceil_div(in.dim, kSumLanes);
  task.out = task.slices > 1 ? static_cast<float*>(scratch) : out;
  const Grid grid{blocks_of(task.dim_tiles * task.q_tiles * in.batch * task.slices), kSumLanes,
                  shared_bytes<float[kQueries]>(kRun)};
  launch(stream, "hamming: weighted_sum", weighted_sum_kernel, grid, task);
  if (task.slices > 1)
    launch(stream, "hamming: add_slices", add_slices,
           Grid{blocks_of(ceil_div(size, kSumLanes)), kSumLanes}, task.out, task.slices, size, out);
}

}  // namespace pentad::hamming::cuda
