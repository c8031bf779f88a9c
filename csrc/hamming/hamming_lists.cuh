// SPDX-License-Identifier: Apache-2.0
// Searches for the k best share this: blocks take slices of the rows and keep k hits per query in
// shared memory (common/topk.cuh), lists that merge_lists makes one.
#pragma once
#include "hamming/hamming_codes.cuh"

namespace pentad::hamming::cuda {

constexpr int64_t kMostHits = 65536;  // of all slices of a query, as far as k allows

struct Search {
  Codes codes;
  const uint8_t* mask;  // (codes.rows) or null
  int64_t queries_count;
  int k, capacity;
  int64_t slices, slice_rows;
  uint64_t* lists;  // scratch memory; first (queries, slices, k), each list rising

  __device__ bool may_return(int64_t row, int64_t last) const {
    return row < last && (!mask || mask[row]);
  }
};

// The lists of a block's queries.
struct Lists {
  uint64_t *hits, *limits;
  int* counts;

  __device__ Lists(Shared& shared, int queries, int capacity)
      : hits(shared.take<uint64_t>(int64_t{queries} * capacity)),
        limits(shared.take<uint64_t>(queries)),
        counts(shared.take<int>(queries)) {}
  static size_t bytes(int queries, int capacity) {
    return shared_bytes<uint64_t>(int64_t{queries} * capacity) + shared_bytes<uint64_t>(queries) +
           shared_bytes<int>(queries);
  }
  __device__ HitList list(const Search& in, int query) const {
    return {hits + int64_t{query} * in.capacity, counts + query, limits + query, in.capacity, in.k};
  }
};

template <class Group>
__device__ void write_list(const Group& group, const HitList& list, const Search& in, int64_t query,
                           int64_t slice) {
  list.shrink(group);
  if (query >= in.queries_count) return;
  uint64_t* out = in.lists + (query * in.slices + slice) * in.k;
  for (int i = group.rank(); i < in.k; i += group.size()) out[i] = list.hits[i];
}

// What the key of a hit stands for; a score's is reversed, as larger is better.
enum class Value { distance, jaccard, common_ones, score };

struct Best {
  Value value;
  void* values;  // (queries, k) int32, or float32 of jaccard and scores
  int64_t* ids;
};

// Bytes for in.lists and what they are merged through; a multiple of eight.
int64_t lists_scratch(int64_t queries, int64_t slices, int64_t k);
void merge_lists(const CudaStream& stream, const Search& in, const Best& best);

}  // namespace pentad::hamming::cuda
