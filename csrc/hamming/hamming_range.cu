// SPDX-License-Identifier: Apache-2.0
// Everything within a radius, in two passes over the same pairs: the first counts the hits of each
// query in each slice of the rows, prefix sums say where they go, the second writes them there.
#include "hamming/hamming_tile.cuh"

namespace pentad::hamming::cuda {
namespace {

constexpr int kPrefixLanes = 512;
constexpr int64_t kBlocks = 1024;     // that keep a device busy
constexpr int64_t kSliceRows = 1024;  // at least

struct Range {
  Codes queries, codes;
  const uint8_t* mask;  // (codes.rows) or null
  Metric metric;
  uint32_t limit;  // a hit's key is smaller
  int64_t slices, slice_rows;
  int64_t* places;  // (queries, slices): how many hits, then where they begin
  int32_t *query_ones, *code_ones;
  void* values;  // (total)
  int64_t* ids;
  int64_t total;
};

// queries (nq, bytes), codes (rows, bytes) -> places (nq, slices), or values and ids (total).
// Limit: the product of bits. Hits of a tile are bits of 64-bit rows in shared memory, so that the
// ones below a bit are its place and ids rise.
template <bool kTensor, bool kWrite>
__global__ void __launch_bounds__(kTileLanes) range_kernel(Range in) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t slice = blockIdx.x % in.slices, q_first = blockIdx.x / in.slices * kTileA;
  Shared shared;
  auto* buffers = shared.take<uint32_t[kPitch]>(2 * kTileRows);
  auto* hits = shared.take<uint32_t[2]>(kTileA);
  int64_t* places = shared.take<int64_t>(kTileA);
  const bool counts = tid < kTileA && q_first + tid < in.queries.rows;
  int64_t* const my_place = in.places + (q_first + tid) * in.slices + slice;
  if (tid < kTileA) {
    places[tid] = kWrite && counts ? *my_place : 0;
    hits[tid][0] = hits[tid][1] = 0;
  }
  const int64_t first = slice * in.slice_rows;
  const int64_t last = min(first + in.slice_rows, in.codes.rows);
  for (int64_t tile = first; tile < last; tile += kTileB) {
    const TilePairs pairs = common_ones<kTensor>(in.queries, q_first, in.codes, tile, buffers);
    uint32_t inside = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = TilePairs::a_row(i), b = TilePairs::b_row(j, i);
        if (q_first + q >= in.queries.rows || tile + b >= last) continue;
        if (in.mask && !in.mask[tile + b]) continue;
        const uint32_t key =
            key_of(in.metric, pairs.c[j][i], in.query_ones[q_first + q], in.code_ones[tile + b]);
        if (key >= in.limit) continue;
        inside |= 1u << (j * 4 + i);
        atomicOr(&hits[q][b / 32], 1u << b % 32);
      }
    }
    __syncthreads();
    if (kWrite) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!(inside >> (j * 4 + i) & 1)) continue;
          const int q = TilePairs::a_row(i), b = TilePairs::b_row(j, i);
          const int before =
              __popc(hits[q][b / 32] & ((1u << b % 32) - 1)) + (b < 32 ? 0 : __popc(hits[q][0]));
          const int64_t at = places[q] + before;
          if (at < 0 || at >= in.total) continue;  // not this search's scratch memory
          const int both = pairs.c[j][i];
          const int sum = in.query_ones[q_first + q] + in.code_ones[tile + b];
          in.ids[at] = tile + b;
          if (in.metric == Metric::jaccard)
            static_cast<float*>(in.values)[at] = jaccard_of(both, sum - both);
          else
            static_cast<int32_t*>(in.values)[at] =
                in.metric == Metric::hamming ? sum - 2 * both : both;
        }
      }
      __syncthreads();
    }
    if (tid < kTileA) {  // the next hits are barriers away, in common_ones
      places[tid] += __popc(hits[tid][0]) + __popc(hits[tid][1]);
      hits[tid][0] = hits[tid][1] = 0;
    }
  }
  if (!kWrite && counts) *my_place = places[tid];
}

// places (nq, slices): each becomes the sum of those before it; indptr (nq + 1).
// Limit: latency, one block for all.
__global__ void __launch_bounds__(kPrefixLanes)
    range_prefix(int64_t* places, int64_t nq, int64_t slices, int64_t* indptr) {
  constexpr int kWarps = kPrefixLanes / 32;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  Shared shared;
  int64_t* sums = shared.take<int64_t>(kWarps);
  int64_t before = 0;
  for (int64_t first = 0; first < nq * slices; first += kPrefixLanes) {
    const int64_t i = first + tid;
    const int64_t own = i < nq * slices ? places[i] : 0;
    int64_t upto = own;  // and with it the lanes before in the warp
    for (int by = 1; by < 32; by *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, upto, by);
      if (lane_of_warp() >= by) upto += other;
    }
    if (lane_of_warp() == 31) sums[warp] = upto;
    __syncthreads();
    int64_t total = 0, warps_before = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) warps_before = total;
      total += sums[w];
    }
    __syncthreads();
    const int64_t place = before + warps_before + upto - own;
    if (i < nq * slices) {
      places[i] = place;
      if (i % slices == 0) indptr[i / slices] = place;
    }
    before += total;
  }
  if (tid == 0) indptr[nq] = before;
}

int64_t slices_of(int64_t nq, int64_t rows) {
  const int64_t query_tiles = max(int64_t{1}, ceil_div(nq, kTileA));
  return max(int64_t{1}, min(kBlocks / query_tiles, ceil_div(rows, kSliceRows)));
}

Range range_of(const Matrix<const uint8_t>& queries, const Matrix<const uint8_t>& codes,
               const uint8_t* mask, Metric metric, uint32_t limit, void* scratch) {
  Range in{Codes(queries), Codes(codes), mask,    metric,  limit,   0, 0,
           nullptr,        nullptr,      nullptr, nullptr, nullptr, 0};
  in.slices = slices_of(queries.rows, codes.rows);
  in.slice_rows = ceil_div(ceil_div(codes.rows, in.slices), kTileB) * kTileB;
  in.places = static_cast<int64_t*>(scratch);
  in.query_ones = reinterpret_cast<int32_t*>(in.places + queries.rows * in.slices);
  in.code_ones = in.query_ones + queries.rows;
  return in;
}

template <bool kWrite>
void pass(const CudaStream& stream, const Range& in, Product product) {
  const Grid grid{blocks_of(ceil_div(in.queries.rows, kTileA) * in.slices), kTileLanes,
                  kTileShared + shared_bytes<uint32_t[2]>(kTileA) + shared_bytes<int64_t>(kTileA)};
  const bool tensor = counts_on_tensor_cores(stream, product);
  launch(stream, "hamming: range",
         tensor ? range_kernel<true, kWrite> : range_kernel<false, kWrite>, grid, in);
}

}  // namespace

int64_t range_scratch(int64_t nq, int64_t rows) {
  return nq * slices_of(nq, rows) * 8 + (nq + rows) * 4;
}

void range_count(const CudaStream& stream, const Matrix<const uint8_t>& queries,
                 const Matrix<const uint8_t>& codes, const uint8_t* mask, Metric metric,
                 uint32_t limit, int64_t* indptr, void* scratch, Product product) {
  const int64_t nq = queries.rows;
  const Range in = range_of(queries, codes, mask, metric, limit, scratch);
  if (nq) {
    count_ones(stream, in.queries, in.query_ones);
    if (codes.rows) count_ones(stream, in.codes, in.code_ones);
    pass<false>(stream, in, product);
  }
  launch(stream, "hamming: range_prefix", range_prefix,
         Grid{1, kPrefixLanes, shared_bytes<int64_t>(kPrefixLanes / 32)}, in.places, nq, in.slices,
         indptr);
}

void range_write(const CudaStream& stream, const Matrix<const uint8_t>& queries,
                 const Matrix<const uint8_t>& codes, const uint8_t* mask, Metric metric,
                 uint32_t limit, int64_t total, void* values, int64_t* ids, void* scratch,
                 Product product) {
  if (queries.rows == 0 || total == 0) return;
  Range in = range_of(queries, codes, mask, metric, limit, scratch);
  in.values = values;
  in.ids = ids;
  in.total = total;
  pass<true>(stream, in, product);
}

}  // namespace pentad::hamming::cuda
