// SPDX-License-Identifier: Apache-2.0
// Tables of scores, their sums by codes, and the gradient of these sums.
#include "pq/grouped_sum.cuh"
#include "pq/lookup_cuda.h"

namespace pentad::pq::cuda {
namespace {

constexpr int kRows = 4;               // of a lane
constexpr int64_t kEntries = 8 << 10;  // of tables in shared memory at a time: 32 KB

// queries (nq, M * width), codebooks (M, K, width) -> tables (nq, M, K).
// Limit: additions in double, of which a device may have few; the codebooks come from the caches.
__global__ void __launch_bounds__(kLanes)
    score_entries(ScoreTables in, int64_t count, float* tables) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t row = quotient(at, in.levels), k = at - row * in.levels;
  const int64_t query = quotient(row, in.subspaces), m = row - query * in.subspaces;
  const float* q =
      static_cast<const float*>(in.q) + query * in.q_row_stride + m * in.width * in.q_stride;
  const float* c =
      static_cast<const float*>(in.codebooks) + m * in.c_stride[0] + k * in.c_stride[1];
  double sum = 0;
  for (int64_t d = 0; d < in.width; ++d) {
    const double x = q[d * in.q_stride], y = c[d * in.c_stride[2]];
    const double difference = __dadd_rn(x, -y);
    sum = __dadd_rn(sum, in.inner_product ? __dmul_rn(x, y) : __dmul_rn(difference, difference));
  }
  tables[at] = static_cast<float>(sum);
}

// tables (nq, M, K), codes (n, M) -> out (nq, n). Tables that are too large for shared memory are
// read where they are (chunk 0).
// Limit: shared memory, one load per code and query, whose banks the codes hit at random.
__global__ void __launch_bounds__(kLanes)
    sum_entries(const float* tables, int64_t queries, int64_t levels, Codes codes, int64_t chunk,
                float* out) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t block = quotient(blockIdx.x, queries), query = blockIdx.x - block * queries;
  const int64_t first = block * (kLanes * kRows) + tid, columns = codes.columns;
  const float* table = tables + query * columns * levels;
  Shared shared;
  float* held = shared.take<float>(chunk * levels);
  float sums[kRows] = {};
  const int64_t step = chunk ? chunk : columns;
  for (int64_t m_first = 0; m_first < columns; m_first += step) {
    const int64_t m_last = min(columns, m_first + step);
    if (chunk) {
      __syncthreads();
      for (int64_t i = tid; i < (m_last - m_first) * levels; i += kLanes)
        held[i] = table[m_first * levels + i];
      __syncthreads();
    }
    const float* entries = chunk ? held : table + m_first * levels;
    for (int64_t m = m_first; m < m_last; ++m, entries += levels)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r * kLanes;
        if (row >= codes.rows) continue;
        const int64_t code = code_below(codes, row, m, levels);
        sums[r] = __fadd_rn(sums[r], code < 0 ? not_a_number() : entries[code]);
      }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first + r * kLanes < codes.rows) out[query * codes.rows + first + r * kLanes] = sums[r];
}

// codes (n, M) -> keys, items (n * M): the entry of the tables, and the row.
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    number_entries(Codes codes, int64_t levels, uint32_t none, uint32_t* keys, uint32_t* items) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= codes.rows * codes.columns) return;
  const int64_t i = quotient(at, codes.columns), m = at - i * codes.columns;
  const int64_t code = code_below(codes, i, m, levels);
  keys[at] = code < 0 ? none : static_cast<uint32_t>(m * levels + code);
  items[at] = static_cast<uint32_t>(i);
}

struct ScoreGradients {
  const float* d_out;
  int64_t row_stride, stride;

  __device__ float operator()(uint32_t item, int64_t query) const {
    return d_out[query * row_stride + item * stride];
  }
};

struct TableEntries {
  float* out;
  int64_t entries;  // of a query

  __device__ void operator()(uint32_t key, int64_t query, float sum) const {
    out[query * entries + key] = sum;
  }
};

}  // namespace

void score_tables(const CudaStream& stream, const ScoreTables& p, float* tables) {
  const int64_t count = p.queries * p.subspaces * p.levels;
  if (count)
    launch(stream, "pq: score_entries", score_entries,
           Grid{blocks_of(ceil_div(count, kLanes)), kLanes}, p, count, tables);
}

void table_sum(const CudaStream& stream, const float* tables, int64_t queries, int64_t levels,
               const Codes& codes, float* out) {
  if (queries == 0 || codes.rows == 0) return;
  const int64_t chunk = min(codes.columns, kEntries / max(levels, int64_t{1}));
  launch(stream, "pq: sum_entries", sum_entries,
         Grid{blocks_of(ceil_div(codes.rows, kLanes * kRows) * queries), kLanes,
              shared_bytes<float>(chunk * levels)},
         tables, queries, levels, codes, chunk, out);
}

int64_t table_sum_backward_scratch(int64_t codes, int64_t subspaces, int64_t queries,
                                   int64_t levels) {
  check_groups(codes * subspaces, subspaces * levels);
  Pieces pieces;
  const SortSpace space(pieces, codes * subspaces);
  take_partial_sums(pieces, codes * subspaces, queries);
  return pieces.bytes();
}

void table_sum_backward(const CudaStream& stream, const float* d_out, int64_t row_stride,
                        int64_t stride, int64_t queries, int64_t levels, const Codes& codes,
                        float* d_tables, void* scratch) {
  const int64_t count = codes.rows * codes.columns, entries = codes.columns * levels;
  check_groups(count, entries);
  fill_zeros(stream, d_tables, queries * entries);
  if (queries == 0 || count == 0) return;
  Pieces pieces(scratch);
  const SortSpace space(pieces, count);
  float* partial = take_partial_sums(pieces, count, queries);
  launch(stream, "pq: number_entries", number_entries,
         Grid{blocks_of(ceil_div(count, kLanes)), kLanes}, codes, levels,
         static_cast<uint32_t>(entries), space.keys, space.items);
  grouped_sum(stream, "pq: table_sum gradient", sort_groups(stream, space, count, entries), queries,
              ScoreGradients{d_out, row_stride, stride}, TableEntries{d_tables, entries}, partial);
}

}  // namespace pentad::pq::cuda
