// SPDX-License-Identifier: Apache-2.0
// The lists of a query's slices become one.
#include "hamming/hamming_lists.cuh"

namespace pentad::hamming::cuda {
namespace {

constexpr int kLanes = 256;
constexpr int64_t kMergeHits = 8192;  // 64 KB of shared memory

struct Merge {
  const uint64_t* lists;  // (queries, count, k)
  int64_t count;
  int k, fan, capacity;  // lists that a block merges, and room for them
  uint64_t* out;         // (queries, ceil(count / fan), k), or null: then the results
  Best best;
};

// A hit as the caller sees it, at [at] of values and ids.
__device__ void write_hit(const Best& best, uint64_t hit, int64_t at) {
  const bool none = hit == kNoHit;
  const auto key = static_cast<uint32_t>(hit >> 32);
  best.ids[at] = none ? -1 : static_cast<int64_t>(hit & 0xffffffffu);
  auto* floats = static_cast<float*>(best.values);
  auto* integers = static_cast<int32_t*>(best.values);
  const float infinity = __uint_as_float(0x7f800000u);
  switch (best.value) {
    case Value::distance: integers[at] = none ? 0x7fffffff : static_cast<int32_t>(key); break;
    case Value::jaccard: floats[at] = none ? infinity : device_float_from_key(key); break;
    case Value::common_ones: integers[at] = none ? -1 : 65534 - static_cast<int32_t>(key); break;
    case Value::score: floats[at] = none ? -infinity : device_float_from_key(~key);
  }
}

// lists (queries, count, k) -> (queries, ceil(count / fan), k), or values and ids (queries, k).
// Limit: latency, the barriers of the sort.
__global__ void __launch_bounds__(kLanes) merge_lists_kernel(Merge in) {
  const int64_t groups = (in.count + in.fan - 1) / in.fan;
  const int64_t query = blockIdx.x / groups, first = blockIdx.x % groups * in.fan;
  const int64_t lists = min(int64_t{in.fan}, in.count - first);
  Shared shared;
  uint64_t* hits = shared.take<uint64_t>(in.capacity);
  const uint64_t* from = in.lists + (query * in.count + first) * in.k;
  for (int i = static_cast<int>(threadIdx.x); i < in.capacity; i += kLanes)
    hits[i] = i < lists * in.k ? from[i] : kNoHit;
  sort_hits(WholeBlock(), hits, in.capacity);
  for (int i = static_cast<int>(threadIdx.x); i < in.k; i += kLanes) {
    if (in.out) in.out[int64_t{blockIdx.x} * in.k + i] = hits[i];
    else write_hit(in.best, hits[i], query * in.k + i);
  }
}

int64_t fan_of(int64_t slices, int64_t k) { return min(slices, max(int64_t{2}, kMergeHits / k)); }

}  // namespace

int64_t lists_scratch(int64_t queries, int64_t slices, int64_t k) {
  return queries * (slices + ceil_div(slices, fan_of(slices, k))) * k * 8;
}

void merge_lists(const CudaStream& stream, const Search& in, const Best& best) {
  const int64_t fan = fan_of(in.slices, in.k);
  uint64_t *lists = in.lists, *merged = lists + in.queries_count * in.slices * in.k;
  for (int64_t count = in.slices;; count = ceil_div(count, fan)) {
    const int64_t groups = ceil_div(count, fan);
    const int capacity = power_of_two_from(min(count, fan) * in.k);
    const Merge merge{
        lists, count, in.k, static_cast<int>(fan), capacity, groups > 1 ? merged : nullptr, best};
    launch(stream, "hamming: merge_lists", merge_lists_kernel,
           Grid{blocks_of(in.queries_count * groups), kLanes, shared_bytes<uint64_t>(capacity)},
           merge);
    if (groups == 1) return;
    uint64_t* written = merged;
    merged = lists;
    lists = written;
  }
}

}  // namespace pentad::hamming::cuda
