// SPDX-License-Identifier: Apache-2.0
// The k nearest codes. Blocks take slices of the rows and keep k hits per query in shared memory
// (common/topk.cuh); then kernels merge the lists of a query. Few queries: the lanes read each row
// once, side by side (topk_scan). Many: the tile program, whose product tensor cores have.
#include "hamming/hamming_lists.cuh"
#include "hamming/hamming_tile.cuh"

namespace pentad::hamming::cuda {
namespace {

constexpr int kLanes = 256;           // of a block that scans or merges
constexpr int kScanStep = 256;        // rows between two looks at the lists
constexpr int kScanQueries = 4;       // that share one pass over the rows
constexpr int64_t kFewQueries = 8;    // up to which memory is the limit
constexpr int64_t kTileMaxK = 192;    // 32 lists of 256 hits are 64 KB of shared memory
constexpr int64_t kScanMaxK = 1024;   // of four queries, likewise
constexpr int64_t kBlocks = 1024;     // that keep a device busy
constexpr int64_t kSliceRows = 1024;  // at least
constexpr int64_t kPartRows = 512;    // of a list of average length, at least

struct CodeSearch : Search {
  Codes queries;
  Metric metric;
  Visits visits;  // slices are parts of these lists, unless there are none
  int64_t parts;  // of a list

  __device__ void rows_of(int64_t query, int64_t slice, int64_t& first, int64_t& last) const {
    if (!visits.probes) {
      first = slice * slice_rows;
      last = min(first + slice_rows, codes.rows);
      return;
    }
    first = last = 0;
    const int64_t list = visits.probes[query * visits.count + slice / parts];
    if (list < 0 || list >= visits.lists) return;
    const int64_t begin = visits.borders[list], end = visits.borders[list + 1];
    const int64_t part = (end - begin + parts - 1) / parts;
    first = max(begin + slice % parts * part, int64_t{0});
    last = min(min(first + part, end), codes.rows);
  }
};

// |x xor q| where differ is all ones, |x and q| where it is 0: one logic operation and one popcount.
__device__ inline int count_of(const uint4& x, const uint4& q, uint32_t differ) {
  return __popc((x.x & (q.x | differ)) ^ (q.x & differ)) +
         __popc((x.y & (q.y | differ)) ^ (q.y & differ)) +
         __popc((x.z & (q.z | differ)) ^ (q.z & differ)) +
         __popc((x.w & (q.w | differ)) ^ (q.w & differ));
}

// queries (nq, bytes), codes (rows, bytes) -> lists (nq, slices, k).
// Limit: memory. `row_lanes` lanes share a row, 16 bytes each, so a warp reads whole lines; the
// words of the block's queries stay in shared memory.
template <int kQueries>
__global__ void __launch_bounds__(kLanes) topk_scan(CodeSearch in, int row_lanes) {
  const int tid = static_cast<int>(threadIdx.x);
  const int padded = (in.codes.pieces() + row_lanes - 1) / row_lanes * row_lanes;
  const int64_t slice = blockIdx.x % in.slices, q_first = blockIdx.x / in.slices * kQueries;
  Shared shared;
  uint4* words = shared.take<uint4>(kQueries * padded);
  int* query_ones = shared.take<int>(kQueries);
  const Lists lists(shared, kQueries, in.capacity);
  for (int i = tid; i < kQueries * padded; i += kLanes)
    words[i] = in.queries.piece(q_first + i / padded, i % padded);
  __syncthreads();
  if (tid < kQueries) {
    lists.list(in, tid).clear();
    int ones = 0;
    for (int p = 0; p < padded; ++p) ones += ones_of(words[tid * padded + p]);
    query_ones[tid] = ones;
  }
  __syncthreads();

  const bool jaccard = in.metric == Metric::jaccard;
  const uint32_t differ = in.metric == Metric::hamming ? 0xffffffffu : 0;
  const int member = tid % row_lanes, group = tid / row_lanes, groups = kLanes / row_lanes;
  int64_t first, last;
  in.rows_of(q_first, slice, first, last);
  for (int64_t step = first; step < last; step += kScanStep) {
#pragma unroll 2
    for (int r = group; r < kScanStep; r += groups) {
      const int64_t row = step + r;
      int counts[kQueries] = {}, ones = 0;
      for (int p = member; p < padded; p += row_lanes) {
        const uint4 x = in.codes.piece(row, p);
        if (jaccard) ones += ones_of(x);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) counts[q] += count_of(x, words[q * padded + p], differ);
      }
      for (int by = row_lanes / 2; by; by /= 2) {
#pragma unroll
        for (int q = 0; q < kQueries; ++q) counts[q] += __shfl_xor_sync(kFullWarp, counts[q], by);
        if (jaccard) ones += __shfl_xor_sync(kFullWarp, ones, by);
      }
      if (row >= last) continue;
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        if (q % row_lanes != member || q_first + q >= in.queries.rows) continue;
        const uint32_t key = in.metric == Metric::hamming
                                 ? static_cast<uint32_t>(counts[q])
                                 : key_of(in.metric, counts[q], query_ones[q], ones);
        const HitList list = lists.list(in, q);
        if (hit_of(key, 0) >= *list.limit) continue;
        const int64_t id = in.visits.ids_of ? in.visits.ids_of[row] : row;
        if (!in.mask || in.mask[id]) list.offer(hit_of(key, id));
      }
    }
    __syncthreads();
    for (int q = 0; q < kQueries; ++q)
      if (lists.counts[q] + kScanStep > in.capacity) lists.list(in, q).shrink(WholeBlock());
    __syncthreads();  // the counts have been looked at before anybody offers
  }
  for (int q = 0; q < kQueries; ++q)
    write_list(WholeBlock(), lists.list(in, q), in, q_first + q, slice);
}

// queries (nq, bytes), codes (rows, bytes), ones of both -> lists (nq, slices, k).
// Limit: the product of bits. A warp looks after every fourth of the block's 32 lists.
template <bool kTensor>
__global__ void __launch_bounds__(kTileLanes)
    topk_tiles(CodeSearch in, const int32_t* query_ones, const int32_t* code_ones) {
  const int64_t slice = blockIdx.x % in.slices, q_first = blockIdx.x / in.slices * kTileA;
  Shared shared;
  auto* buffers = shared.take<uint32_t[kPitch]>(2 * kTileRows);
  const Lists lists(shared, kTileA, in.capacity);
  if (threadIdx.x < kTileA) lists.list(in, static_cast<int>(threadIdx.x)).clear();

  const int64_t first = slice * in.slice_rows;
  const int64_t last = min(first + in.slice_rows, in.codes.rows);
  for (int64_t tile = first; tile < last; tile += kTileB) {
    const TilePairs pairs = common_ones<kTensor>(in.queries, q_first, in.codes, tile, buffers);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = TilePairs::a_row(i);
        const int64_t row = tile + TilePairs::b_row(j, i);
        if (q_first + q >= in.queries.rows || !in.may_return(row, last)) continue;
        const uint32_t key =
            key_of(in.metric, pairs.c[j][i], query_ones[q_first + q], code_ones[row]);
        lists.list(in, q).offer(hit_of(key, row));
      }
    }
    __syncthreads();  // the next offers are barriers away, in common_ones
    for (int q = TilePairs::warp(); q < kTileA; q += kTileLanes / 32)
      if (lists.counts[q] + kTileB > in.capacity) lists.list(in, q).shrink(WholeWarp());
  }
  __syncthreads();
  for (int q = TilePairs::warp(); q < kTileA; q += kTileLanes / 32)
    write_list(WholeWarp(), lists.list(in, q), in, q_first + q, slice);
}

// How a search is cut; the results do not depend on it.
struct Plan {
  bool tiles;
  int block_queries, capacity;
  int64_t query_blocks, slices, slice_rows;

  Plan(int64_t nq, int64_t rows, int64_t k) {
    tiles = nq > kFewQueries && k <= kTileMaxK;
    block_queries = tiles ? kTileA : nq == 1 || k > kScanMaxK ? 1 : kScanQueries;
    capacity = power_of_two_from(k + (tiles ? kTileB : kScanStep));
    query_blocks = ceil_div(nq, block_queries);
    slices = min(kBlocks / query_blocks, min(kMostHits / k, ceil_div(rows, kSliceRows)));
    slice_rows = ceil_div(ceil_div(rows, max(slices, int64_t{1})), kScanStep) * kScanStep;
    slices = slice_rows ? max(int64_t{1}, ceil_div(rows, slice_rows)) : 1;
  }
};

// Parts of a list, so that the blocks of few queries keep a device busy.
int64_t parts_of(int64_t nq, int64_t count, int64_t rows, int64_t lists, int64_t k) {
  const int64_t most = min(kBlocks / (nq * count), kMostHits / (count * k));
  return max(int64_t{1}, min(most, ceil_div(rows, lists * kPartRows)));
}

void scan(const CudaStream& stream, const CodeSearch& in, Grid grid, int queries) {
  const int row_lanes =
      static_cast<int>(min(int64_t{32}, int64_t{power_of_two_from(in.codes.pieces())}));
  const int padded = static_cast<int>(ceil_div(in.codes.pieces(), row_lanes)) * row_lanes;
  grid.shared += shared_bytes<uint4>(queries * padded) + shared_bytes<int>(queries);
  launch(stream, "hamming: topk_scan", queries == 1 ? topk_scan<1> : topk_scan<kScanQueries>, grid,
         in, row_lanes);
}

Value value_of(Metric metric) {
  return metric == Metric::hamming   ? Value::distance
         : metric == Metric::jaccard ? Value::jaccard
                                     : Value::common_ones;
}

}  // namespace

int64_t topk_scratch(int64_t nq, int64_t rows, int64_t k) {
  if (nq == 0 || k == 0) return 0;
  const Plan plan(nq, rows, k);
  return lists_scratch(nq, plan.slices, k) + (plan.tiles ? (nq + rows) * 4 : 0);
}

void topk(const CudaStream& stream, const Matrix<const uint8_t>& queries,
          const Matrix<const uint8_t>& codes, const uint8_t* mask, Metric metric, int64_t k,
          void* values, int64_t* ids, void* scratch, Product product) {
  const int64_t nq = queries.rows;
  if (nq == 0 || k == 0) return;
  const Plan plan(nq, codes.rows, k);
  const CodeSearch in{{Codes(codes), mask, nq, static_cast<int>(k), plan.capacity, plan.slices,
                       plan.slice_rows, static_cast<uint64_t*>(scratch)},
                      Codes(queries),
                      metric,
                      {},
                      1};
  Grid grid{blocks_of(plan.query_blocks * plan.slices), kLanes,
            Lists::bytes(plan.block_queries, plan.capacity)};
  if (plan.tiles) {
    auto* query_ones =
        reinterpret_cast<int32_t*>(static_cast<char*>(scratch) + lists_scratch(nq, plan.slices, k));
    int32_t* code_ones = query_ones + nq;
    count_ones(stream, in.queries, query_ones);
    if (codes.rows) count_ones(stream, in.codes, code_ones);
    grid.lanes = kTileLanes;
    grid.shared += kTileShared;
    const bool tensor = counts_on_tensor_cores(stream, product);
    launch(stream, "hamming: topk_tiles", tensor ? topk_tiles<true> : topk_tiles<false>, grid, in,
           query_ones, code_ones);
  } else {
    scan(stream, in, grid, plan.block_queries);
  }
  merge_lists(stream, in, {value_of(metric), values, ids});
}

int64_t topk_lists_scratch(int64_t nq, int64_t count, int64_t rows, int64_t lists, int64_t k) {
  if (nq * count * lists * k == 0) return 0;
  return lists_scratch(nq, count * parts_of(nq, count, rows, lists, k), k);
}

void topk_lists(const CudaStream& stream, const Matrix<const uint8_t>& queries,
                const Matrix<const uint8_t>& codes, const Visits& visits, const uint8_t* mask,
                Metric metric, int64_t k, void* values, int64_t* ids, void* scratch) {
  const int64_t nq = queries.rows;
  if (nq * visits.count * visits.lists * k == 0) return;
  const int64_t parts = parts_of(nq, visits.count, codes.rows, visits.lists, k);
  const CodeSearch in{
      {Codes(codes), mask, nq, static_cast<int>(k), power_of_two_from(k + kScanStep),
       visits.count * parts, 0, static_cast<uint64_t*>(scratch)},
      Codes(queries),
      metric,
      visits,
      parts};
  scan(stream, in, {blocks_of(nq * in.slices), kLanes, Lists::bytes(1, in.capacity)}, 1);
  merge_lists(stream, in, {value_of(metric), values, ids});
}

}  // namespace pentad::hamming::cuda
