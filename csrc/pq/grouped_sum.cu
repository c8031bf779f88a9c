// SPDX-License-Identifier: Apache-2.0
// The stable sort of grouped_sum.cuh: by eight bits at a time, lowest first. A pass counts the digits
// of each block's tile, adds the counts up over the tiles, and moves every item to its place: that of
// its digit, tile, warp and rank within the warp.
#include "pq/grouped_sum.cuh"

#include <utility>

namespace pentad::pq::cuda {
namespace {

constexpr int kDigits = 256, kWarps = kLanes / 32;
constexpr int kSteps = 8;               // of 32 items that a warp takes
constexpr int kTile = kLanes * kSteps;  // items of a block
static_assert(kDigits == kLanes);

// keys (count) -> counts (256, blocks).
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    count_digits(const uint32_t* keys, int64_t count, int shift, uint32_t* counts) {
  const int tid = static_cast<int>(threadIdx.x);
  Shared shared;
  uint32_t* found = shared.take<uint32_t>(kDigits);
  found[tid] = 0;
  __syncthreads();
  for (int s = 0; s < kSteps; ++s) {
    const int64_t i = int64_t{blockIdx.x} * kTile + s * kLanes + tid;
    if (i < count) atomicAdd(&found[keys[i] >> shift & 255], 1u);
  }
  __syncthreads();
  counts[int64_t{tid} * gridDim.x + blockIdx.x] = found[tid];
}

// The sum of the values of the lanes before this one in its block, and of all of them. `sums` has
// room for kWarps + 1; a barrier comes before its next use.
__device__ uint32_t sum_before(uint32_t value, uint32_t* sums) {
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t sum = value;
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, by);
    if (lane >= by) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before = 0;
    for (int w = 0; w <= kWarps; ++w) {
      const uint32_t own = w < kWarps ? sums[w] : 0;
      sums[w] = before;
      before += own;
    }
  }
  __syncthreads();
  return sums[warp] + sum - value;
}

// counts (256, blocks), a block for each digit -> sums over the tiles before; totals (256).
// Limit: latency.
__global__ void __launch_bounds__(kLanes)
    sum_counts(uint32_t* counts, int64_t blocks, uint32_t* totals) {
  Shared shared;
  uint32_t* sums = shared.take<uint32_t>(kWarps + 1);
  uint32_t* row = counts + blockIdx.x * blocks;
  uint32_t total = 0;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int64_t i = first + static_cast<int>(threadIdx.x);
    const uint32_t value = i < blocks ? row[i] : 0;
    const uint32_t before = sum_before(value, sums);
    if (i < blocks) row[i] = total + before;
    total += sums[kWarps];
    __syncthreads();
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

struct Pass {
  const uint32_t *keys, *items;
  int64_t count;
  int shift;
  const uint32_t *counts, *totals;
  uint32_t *keys_out, *items_out;
};

// keys, items (count) -> the same by digit, in their order.
// Limit: memory, whose writes are runs of some items.
__global__ void __launch_bounds__(kLanes) move_items(Pass in) {
  const int tid = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = tid / 32;
  Shared shared;
  auto* found = shared.take<uint32_t[kDigits]>(kWarps);  // of each warp; then those before it
  uint32_t* place = shared.take<uint32_t>(kDigits);
  uint32_t* sums = shared.take<uint32_t>(kWarps + 1);
  for (int w = 0; w < kWarps; ++w) found[w][tid] = 0;
  place[tid] = sum_before(in.totals[tid], sums) + in.counts[int64_t{tid} * gridDim.x + blockIdx.x];
  __syncthreads();

  const int64_t first = int64_t{blockIdx.x} * kTile + warp * (kSteps * 32) + lane;
  uint32_t keys[kSteps], ranks[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const bool inside = first + s * 32 < in.count;
    keys[s] = inside ? in.keys[first + s * 32] : 0;
    const uint32_t digit = keys[s] >> in.shift & 255;
    const uint32_t same = __match_any_sync(kFullWarp, inside ? digit : 256u);
    const uint32_t before = inside ? found[warp][digit] : 0;
    ranks[s] = before + static_cast<uint32_t>(__popc(same & ((1u << lane) - 1)));
    __syncwarp();
    if (inside && (same & ((1u << lane) - 1)) == 0)
      found[warp][digit] = before + static_cast<uint32_t>(__popc(same));
    __syncwarp();
  }
  __syncthreads();
  uint32_t before = 0;
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t own = found[w][tid];
    found[w][tid] = before;
    before += own;
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (first + s * 32 >= in.count) continue;
    const uint32_t digit = keys[s] >> in.shift & 255;
    const uint32_t to = place[digit] + found[warp][digit] + ranks[s];
    in.keys_out[to] = keys[s];
    in.items_out[to] = in.items[first + s * 32];
  }
}

// out (count).
// Limit: memory.
__global__ void __launch_bounds__(kLanes) zeros(float* out, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (i < count) out[i] = 0;
}

}  // namespace

SortSpace::SortSpace(Pieces& pieces, int64_t count)
    : keys(pieces.take<uint32_t>(count)),
      items(pieces.take<uint32_t>(count)),
      other_keys(pieces.take<uint32_t>(count)),
      other_items(pieces.take<uint32_t>(count)),
      counts(pieces.take<uint32_t>(kDigits * ceil_div(count, kTile))),
      totals(pieces.take<uint32_t>(kDigits)) {}

void check_groups(int64_t count, int64_t rows) {
  if (count > kMostItems || rows >= kMostItems)
    throw std::invalid_argument(
        "a CUDA gradient cannot take more than 2^32 - 1 codes or rows, but "
        "there are " +
        std::to_string(count) + " and " + std::to_string(rows));
}

Groups sort_groups(const CudaStream& stream, const SortSpace& space, int64_t count, int64_t rows) {
  uint32_t *keys = space.keys, *items = space.items;
  uint32_t *other_keys = space.other_keys, *other_items = space.other_items;
  const int64_t blocks = ceil_div(count, kTile);
  for (int shift = 0; count && shift < 32 && rows >> shift; shift += 8) {  // keys are up to `rows`
    launch(stream, "pq: count_digits", count_digits,
           Grid{blocks_of(blocks), kLanes, shared_bytes<uint32_t>(kDigits)}, keys, count, shift,
           space.counts);
    launch(stream, "pq: sum_counts", sum_counts,
           Grid{kDigits, kLanes, shared_bytes<uint32_t>(kWarps + 1)}, space.counts, blocks,
           space.totals);
    launch(stream, "pq: move_items", move_items,
           Grid{blocks_of(blocks), kLanes,
                shared_bytes<uint32_t[kDigits]>(kWarps) + shared_bytes<uint32_t>(kDigits) +
                    shared_bytes<uint32_t>(kWarps + 1)},
           Pass{keys, items, count, shift, space.counts, space.totals, other_keys, other_items});
    std::swap(keys, other_keys);
    std::swap(items, other_items);
  }
  return {keys, items, count, static_cast<uint32_t>(rows)};
}

void fill_zeros(const CudaStream& stream, float* out, int64_t count) {
  if (count)
    launch(stream, "pq: zeros", zeros, Grid{blocks_of(ceil_div(count, kLanes)), kLanes}, out,
           count);
}

}  // namespace pentad::pq::cuda
