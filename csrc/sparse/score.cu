// SPDX-License-Identifier: Apache-2.0
// Scores of sparse rows with sparse rows. Rows of one side, 32 at a time, become a table with a line
// for each term: [term][32]. A row of the other side then reads the line of each of its terms, all 32
// products at once. Tables lie in scratch memory, up to 64 MB at a time.
#include "common/cuda_launch.cuh"
#include "sparse/score_cuda.h"

namespace pentad::sparse::cuda {
namespace {

constexpr int kLanes = 256, kWarps = kLanes / 32;
constexpr int kGroup = 32;  // rows of a table, which are the lanes of a warp
constexpr int kTileDocs = 32;
constexpr int64_t kTableBytes = int64_t{64} << 20;  // of all tables at a time

struct Range {
  int64_t begin, end;
};

// Rows as a kernel may trust them: what indptr says stays within the entries.
struct SafeRows {
  Rows<float> rows;

  __device__ Range of(int64_t row) const {
    const int64_t begin = min(max(rows.indptr[row], int64_t{0}), rows.nnz);
    return {begin, min(max(rows.indptr[row + 1], begin), rows.nnz)};
  }
  // The row of an entry: the last that begins at or before it.
  __device__ int64_t row_of(int64_t entry) const {
    int64_t low = 0, high = rows.rows;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (rows.indptr[middle] <= entry) low = middle;
      else high = middle;
    }
    return low;
  }
  // The place of a term in a row, or -1.
  __device__ int64_t find(Range range, int term) const {
    int64_t low = range.begin, high = range.end;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (rows.indices[middle] < term) low = middle + 1;
      else high = middle;
    }
    return low < range.end && rows.indices[low] == term ? low : -1;
  }
};

// Tables of the rows [32 first, 32 (first + count)) of one side.
struct Tables {
  float* lines;  // [count][columns][32]
  int64_t columns, first, count;

  __device__ float* line(int64_t group, int term) const {
    return lines + (group * columns + term) * kGroup;
  }
};

// Limit: memory, 16 bytes a lane.
__global__ void __launch_bounds__(kLanes) clear_tables(float4* lines, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  if (i < count) lines[i] = float4{0, 0, 0, 0};
}

// A warp for each row. Limit: memory, a sector for each entry.
__global__ void __launch_bounds__(kLanes) fill_tables(SafeRows side, Tables tables) {
  const int64_t in_tables = (int64_t{blockIdx.x} * kLanes + threadIdx.x) / 32;
  const int64_t row = tables.first * kGroup + in_tables;
  if (in_tables >= tables.count * kGroup || row >= side.rows.rows) return;
  const Range range = side.of(row);
  for (int64_t e = range.begin + lane_of_warp(); e < range.end; e += 32) {
    const int term = side.rows.indices[e];
    if (term >= 0 && term < tables.columns)
      tables.line(in_tables / kGroup, term)[in_tables % kGroup] = side.rows.values[e];
  }
}

// docs (n) by a table of queries -> out (nq, n), 32 by 32 of them a block; a warp has four documents,
// a lane a query. Sums are doubles over rising terms: the products are exact in double, and terms that
// a query lacks add 0. Limit: the cache, 128 bytes for each entry and 32 queries.
__global__ void __launch_bounds__(kLanes)
    score_tile(SafeRows docs, Tables tables, int64_t queries, int64_t doc_tiles, float* out) {
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t group = blockIdx.x / doc_tiles, first = blockIdx.x % doc_tiles * kTileDocs;
  Shared shared;
  auto* scores = shared.take<float[kTileDocs + 1]>(kGroup);
  for (int d = warp; d < kTileDocs; d += kWarps) {
    double sum = 0;
    if (first + d < docs.rows.rows) {
      const Range range = docs.of(first + d);
      for (int64_t e0 = range.begin; e0 < range.end; e0 += 32) {
        const bool inside = e0 + lane < range.end;
        int term = inside ? docs.rows.indices[e0 + lane] : 0;
        float value = inside ? docs.rows.values[e0 + lane] : 0.0f;
        if (term < 0 || term >= tables.columns) term = 0, value = 0;
        const int count = static_cast<int>(min(int64_t{32}, range.end - e0));
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          const float x = tables.line(group, __shfl_sync(kFullWarp, term, i))[lane];
          sum += static_cast<double>(x) * __shfl_sync(kFullWarp, value, i);
        }
      }
    }
    scores[lane][d] = static_cast<float>(sum) + 0.0f;
  }
  __syncthreads();
  for (int q = warp; q < kGroup; q += kWarps) {
    const int64_t query = (tables.first + group) * kGroup + q, doc = first + lane;
    if (query < queries && doc < docs.rows.rows)
      out[query * docs.rows.rows + doc] = scores[q][lane];
  }
}

// Gradients of the entries of one side by tables of the other: out[e] = sum over the other side's rows
// r, rising, that have the term of e, of g(row of e, r) times their value. A lane for each entry.
// `sums` carries the double sums from tables to tables. Limit: the cache, as score_tile.
struct EntryTask {
  SafeRows side;
  Tables tables;
  int64_t others;  // rows of the other side
  const float* g;
  int64_t own_stride, other_stride;  // of g
  double* sums;
  bool begin, end;
  float* out;
};
__global__ void __launch_bounds__(kLanes) entry_gradients(EntryTask task) {
  const int64_t e = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  if (e >= task.side.rows.nnz) return;
  const int term = task.side.rows.indices[e];
  const float* g = task.g + task.side.row_of(e) * task.own_stride;
  double sum = task.begin ? 0.0 : task.sums[e];
  if (term >= 0 && term < task.tables.columns)
    for (int64_t group = 0; group < task.tables.count; ++group) {
      const auto* line = reinterpret_cast<const float4*>(task.tables.line(group, term));
      const int64_t first = (task.tables.first + group) * kGroup;
#pragma unroll
      for (int i = 0; i < kGroup / 4; ++i) {
        const float4 four = line[i];
        const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)  // what is not 0 is a row that exists
          if (x[j] != 0)
            sum += static_cast<double>(x[j]) * g[(first + i * 4 + j) * task.other_stride];
      }
    }
  if (task.end) task.out[e] = static_cast<float>(sum) + 0.0f;
  else task.sums[e] = sum;
}

// A warp for each pair goes through the shorter row and looks its terms up in the other.
// Limit: latency of the look-ups, log2 of the longer row's length for 32 terms.
__global__ void __launch_bounds__(kLanes)
    pair_scores(SafeRows queries, SafeRows docs, Pairs pairs, float* out) {
  const int64_t p = (int64_t{blockIdx.x} * kLanes + threadIdx.x) / 32;
  const int lane = lane_of_warp();
  if (p >= pairs.count) return;
  const int64_t q = pairs.query[p], d = pairs.doc[p];
  if (q < 0 || q >= queries.rows.rows || d < 0 || d >= docs.rows.rows) {
    if (lane == 0) out[p] = __uint_as_float(0x7fc00000);
    return;
  }
  const Range of_query = queries.of(q), of_doc = docs.of(d);
  const bool by_query = of_query.end - of_query.begin <= of_doc.end - of_doc.begin;
  const SafeRows own = by_query ? queries : docs, other = by_query ? docs : queries;
  const Range range = by_query ? of_query : of_doc, within = by_query ? of_doc : of_query;
  double sum = 0;
  for (int64_t e0 = range.begin; e0 < range.end; e0 += 32) {
    const int64_t e = e0 + lane;
    const int64_t found = e < range.end ? other.find(within, own.rows.indices[e]) : -1;
    const double product =
        found >= 0 ? static_cast<double>(own.rows.values[e]) * other.rows.values[found] : 0.0;
    for (uint32_t left = __ballot_sync(kFullWarp, found >= 0); left; left &= left - 1)
      sum += __shfl_sync(kFullWarp, product, __ffs(left) - 1);
  }
  if (lane == 0) out[p] = static_cast<float>(sum) + 0.0f;
}

// A lane for each entry goes through the pairs of its row. Limit: latency, as pair_scores.
__global__ void __launch_bounds__(kLanes)
    pair_gradients(SafeRows side, SafeRows other, PairsOfRows pairs, const float* d_out,
                   float* out) {
  const int64_t e = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  if (e >= side.rows.nnz) return;
  const int64_t row = side.row_of(e);
  const int term = side.rows.indices[e];
  double sum = 0;
  for (int64_t i = max(pairs.starts[row], int64_t{0}); i < min(pairs.starts[row + 1], pairs.count);
       ++i) {
    const int64_t p = pairs.order[i];
    if (p < 0 || p >= pairs.count) continue;
    const int64_t r = pairs.other[p];
    const int64_t found =
        r >= 0 && r < other.rows.rows ? other.find(other.of(r), term) : int64_t{-1};
    if (found >= 0) sum += static_cast<double>(other.rows.values[found]) * d_out[p];
  }
  out[e] = static_cast<float>(sum) + 0.0f;
}

// How many tables there are at a time.
int64_t tables_at_once(int64_t rows, int64_t columns) {
  const int64_t bytes = columns * kGroup * static_cast<int64_t>(sizeof(float));
  const int64_t fit = max(int64_t{1}, kTableBytes / max(int64_t{1}, bytes));
  return min(ceil_div(rows, kGroup), fit);
}
int64_t table_bytes(int64_t rows, int64_t columns) {
  return tables_at_once(rows, columns) * columns * kGroup * static_cast<int64_t>(sizeof(float));
}

Grid lanes(int64_t count) { return {blocks_of(ceil_div(count, kLanes)), kLanes}; }

// use(tables, first?, last?) for the tables of all rows of a side.
template <class Use>
void with_tables(const CudaStream& stream, const Rows<float>& side, int64_t columns, void* scratch,
                 const Use& use) {
  const int64_t groups = ceil_div(side.rows, kGroup), step = tables_at_once(side.rows, columns);
  for (int64_t first = 0; first < groups; first += step) {
    const Tables tables{static_cast<float*>(scratch), columns, first, min(step, groups - first)};
    const int64_t pieces = tables.count * columns * kGroup / 4;
    if (pieces)
      launch(stream, "sparse: clear_tables", clear_tables, lanes(pieces),
             reinterpret_cast<float4*>(tables.lines), pieces);
    launch(stream, "sparse: fill_tables", fill_tables, lanes(tables.count * kGroup * 32),
           SafeRows{side}, tables);
    use(tables, first == 0, first + step >= groups);
  }
}

}  // namespace

int64_t score_scratch(int64_t queries, int64_t columns) {
  return table_bytes(queries, max(columns, int64_t{1}));
}

void score(const CudaStream& stream, const Rows<float>& queries, const Rows<float>& docs,
           int64_t columns, float* out, void* scratch) {
  if (queries.rows == 0 || docs.rows == 0) return;
  const int64_t doc_tiles = ceil_div(docs.rows, kTileDocs);
  with_tables(stream, queries, max(columns, int64_t{1}), scratch,
              [&](const Tables& tables, bool, bool) {
                launch(stream, "sparse: score_tile", score_tile,
                       Grid{blocks_of(doc_tiles * tables.count), kLanes,
                            shared_bytes<float[kTileDocs + 1]>(kGroup)},
                       SafeRows{docs}, tables, queries.rows, doc_tiles, out);
              });
}

int64_t score_backward_scratch(int64_t queries, int64_t docs, int64_t query_entries,
                               int64_t doc_entries, int64_t columns) {
  columns = max(columns, int64_t{1});
  return max(table_bytes(queries, columns), table_bytes(docs, columns)) +
         max(query_entries, doc_entries) * static_cast<int64_t>(sizeof(double));
}

void score_backward(const CudaStream& stream, const Rows<float>& queries, const Rows<float>& docs,
                    int64_t columns, const float* d_out, float* d_queries, float* d_docs,
                    void* scratch) {
  columns = max(columns, int64_t{1});
  auto* sums = reinterpret_cast<double*>(
      static_cast<char*>(scratch) +
      max(table_bytes(queries.rows, columns), table_bytes(docs.rows, columns)));
  const auto gradients = [&](const Rows<float>& side, const Rows<float>& other, int64_t own_stride,
                             int64_t other_stride, float* out) {
    if (!out || side.nnz == 0) return;
    EntryTask task{SafeRows{side}, {},   other.rows, d_out, own_stride,
                   other_stride,   sums, true,       true,  out};
    if (other.rows == 0)  // no tables: zeros
      return launch(stream, "sparse: entry_gradients", entry_gradients, lanes(side.nnz), task);
    with_tables(stream, other, columns, scratch, [&](const Tables& tables, bool begin, bool end) {
      task.tables = tables, task.begin = begin, task.end = end;
      launch(stream, "sparse: entry_gradients", entry_gradients, lanes(side.nnz), task);
    });
  };
  gradients(queries, docs, docs.rows, 1, d_queries);
  gradients(docs, queries, 1, docs.rows, d_docs);
}

void score_pairs(const CudaStream& stream, const Rows<float>& queries, const Rows<float>& docs,
                 const Pairs& pairs, float* out) {
  if (pairs.count)
    launch(stream, "sparse: pair_scores", pair_scores, lanes(pairs.count * 32), SafeRows{queries},
           SafeRows{docs}, pairs, out);
}

void score_pairs_backward(const CudaStream& stream, const Rows<float>& side,
                          const Rows<float>& other, const PairsOfRows& pairs, const float* d_out,
                          float* out) {
  if (side.nnz)
    launch(stream, "sparse: pair_gradients", pair_gradients, lanes(side.nnz), SafeRows{side},
           SafeRows{other}, pairs, d_out, out);
}

}  // namespace pentad::sparse::cuda
