// SPDX-License-Identifier: Apache-2.0
// Float queries by bits, and the transpose.
#include "hamming/hamming_codes.cuh"

namespace pentad::hamming::cuda {
namespace {

// --- score ------------------------------------------------------------------------------------------

constexpr int kScoreLanes = 256;
constexpr int kScoreQueries = 2;  // of a block: their tables are 32 KB of shared memory
constexpr int kScoreRows = 4;     // of a lane
constexpr int kScoreBytes = 128;  // of the rows, between two fillings of the tables
constexpr int kRowsOfBlock = kScoreLanes * kScoreRows;

// x (nq, dim) float32, codes (n, bytes) -> out (nq, n).
// Limit: shared memory, one load of a table per four dimensions of a pair. The 16 entries of a table
// lie in 16 banks, and the lanes of a warp read one table, so there are no conflicts.
__global__ void __launch_bounds__(kScoreLanes)
    score_kernel(Matrix<const float> x, Codes codes, int64_t row_blocks, float* out) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t q_first = blockIdx.x / row_blocks * kScoreQueries;
  const int64_t row_first = blockIdx.x % row_blocks * kRowsOfBlock + tid;
  Shared shared;
  // [query][nibble][16]: the sum of four terms +-x, as the CPU's tables have it.
  auto* tables = shared.take<float[2 * kScoreBytes][16]>(kScoreQueries);
  float sums[kScoreQueries][kScoreRows] = {};
  for (int byte = 0; byte < codes.bytes; byte += kScoreBytes) {
    for (int i = tid; i < kScoreQueries * 2 * kScoreBytes; i += kScoreLanes) {
      const int q = i / (2 * kScoreBytes), nibble = i % (2 * kScoreBytes);
      // A byte's low nibble, its later dimensions, comes first.
      const int64_t dim = (byte + nibble / 2) * int64_t{8} + (nibble % 2 ? 0 : 4);
      float term[4];
      for (int j = 0; j < 4; ++j)
        term[j] = dim + j < x.cols && q_first + q < x.rows
                      ? x.data[(q_first + q) * x.row_stride + (dim + j) * x.col_stride]
                      : 0.0f;
      for (int v = 0; v < 16; ++v) {
        float sum = v & 8 ? term[0] : -term[0];
        sum += v & 4 ? term[1] : -term[1];
        sum += v & 2 ? term[2] : -term[2];
        sum += v & 1 ? term[3] : -term[3];
        tables[q][nibble][v] = sum;
      }
    }
    __syncthreads();
    for (int p = 0; p < kScoreBytes / 16 && byte + p * 16 < codes.bytes; ++p) {
      uint4 pieces[kScoreRows];
#pragma unroll
      for (int r = 0; r < kScoreRows; ++r)
        pieces[r] = codes.piece(row_first + r * kScoreLanes, byte / 16 + p);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int r = 0; r < kScoreRows; ++r) {
          const uint4& piece = pieces[r];
          const uint32_t word = w == 0 ? piece.x : w == 1 ? piece.y : w == 2 ? piece.z : piece.w;
#pragma unroll
          for (int nibble = 0; nibble < 8; ++nibble)
#pragma unroll
            for (int q = 0; q < kScoreQueries; ++q)
              sums[q][r] += tables[q][p * 32 + w * 8 + nibble][word >> (4 * nibble) & 15];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int q = 0; q < kScoreQueries; ++q)
#pragma unroll
    for (int r = 0; r < kScoreRows; ++r) {
      const int64_t row = row_first + r * kScoreLanes;
      if (q_first + q < x.rows && row < codes.rows)
        out[(q_first + q) * codes.rows + row] = sums[q][r];
    }
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
                  shared_bytes<float[2 * kScoreBytes][16]>(kScoreQueries)};
  launch(stream, "hamming: score", score_kernel, grid, x, Codes(codes), row_blocks, out);
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
