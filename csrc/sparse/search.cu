// SPDX-License-Identifier: Apache-2.0
// A block adds up the scores of one window's documents for one query in shared memory, list by list,
// and keeps the k best of them (common/topk.cuh); then a block for each query merges its windows.
// Postings are read once for each query, from the cache where queries are many: the blocks of a window
// follow each other.
#include "common/topk.cuh"
#include "sparse/search_cuda.h"

namespace pentad::sparse::cuda {
namespace {

constexpr int kLanes = 256;
constexpr int kTermsAtOnce = 256;  // of a query, whose lists are sought side by side

struct Best {
  int k, capacity;
  int64_t windows;
  uint64_t* lists;  // (queries, windows, k), each rising
};

// Room for hits: `k`, and what the lanes may offer between two looks.
int capacity_for(int64_t k) { return power_of_two_from(k + kLanes); }

// Offers one hit of each lane (kNoHit: none) and sorts where the next might not fit.
__device__ inline void offer_all(const HitList& list, uint64_t hit) {
  if (hit != kNoHit) list.offer(hit);
  __syncthreads();
  const bool full = *list.count > list.capacity - kLanes;
  __syncthreads();
  if (full) list.shrink(WholeBlock{});
}

// postings, queries (nq) -> lists (nq, windows, k).
// Limit: latency of the lists, one after the other so that terms rise; 6 bytes a posting.
__global__ void __launch_bounds__(kLanes)
    search_windows(Inverted docs, Rows<float> queries, Best best) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t q = blockIdx.x % queries.rows, window = blockIdx.x / queries.rows;
  const int64_t first = window * kWindowRows;
  const int count = static_cast<int>(min(kWindowRows, docs.documents - first));
  Shared shared;
  double* sums = shared.take<double>(kWindowRows);
  auto* begins = shared.take<int64_t>(kTermsAtOnce);
  auto* ends = shared.take<int64_t>(kTermsAtOnce);
  float* weights = shared.take<float>(kTermsAtOnce);
  const HitList list{shared.take<uint64_t>(best.capacity), shared.take<int>(1),
                     shared.take<uint64_t>(1), best.capacity, best.k};
  if (tid == 0) list.clear();
  for (int i = tid; i < count; i += kLanes) sums[i] = 0;

  const int64_t from = min(max(queries.indptr[q], int64_t{0}), queries.nnz);
  const int64_t to = min(max(queries.indptr[q + 1], from), queries.nnz);
  const int64_t lists_from = min(max(docs.windows[window], int64_t{0}), docs.lists);
  const int64_t lists_to = min(max(docs.windows[window + 1], lists_from), docs.lists);
  for (int64_t t0 = from; t0 < to; t0 += kTermsAtOnce) {
    __syncthreads();
    if (t0 + tid < to) {
      const int term = queries.indices[t0 + tid];
      int64_t low = lists_from, high = lists_to;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (docs.list_terms[middle] < term) low = middle + 1;
        else high = middle;
      }
      const bool found = low < lists_to && docs.list_terms[low] == term;
      begins[tid] = found ? max(docs.starts[low], int64_t{0}) : 0;
      ends[tid] = found ? min(docs.starts[low + 1], docs.entries) : 0;
      weights[tid] = queries.values[t0 + tid];
    }
    __syncthreads();
    const int terms = static_cast<int>(min(int64_t{kTermsAtOnce}, to - t0));
    for (int t = 0; t < terms; ++t) {
      if (begins[t] >= ends[t]) continue;
      const double weight = weights[t];
      for (int64_t e = begins[t] + tid; e < ends[t]; e += kLanes) {
        const int place = docs.places[e];
        if (place >= 0 && place < count) sums[place] += weight * docs.values[e];
      }
      __syncthreads();  // a document's next term comes later
    }
  }
  __syncthreads();

  for (int i0 = 0; i0 < count; i0 += kLanes) {
    const int i = i0 + tid;
    uint64_t hit = kNoHit;
    if (i < count && (!docs.mask || docs.mask[first + i]))
      hit = hit_of(~device_key_from_float(static_cast<float>(sums[i]) + 0.0f), first + i);
    offer_all(list, hit);
  }
  list.shrink(WholeBlock{});
  uint64_t* out = best.lists + (q * best.windows + window) * best.k;
  for (int i = tid; i < best.k; i += kLanes) out[i] = list.hits[i];
}

// lists (nq, windows, k) -> scores, ids (nq, k), a block for each query. Limit: latency of the sorts.
__global__ void __launch_bounds__(kLanes) merge_windows(Best best, float* scores, int64_t* ids) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t q = blockIdx.x, hits = best.windows * best.k;
  Shared shared;
  const HitList list{shared.take<uint64_t>(best.capacity), shared.take<int>(1),
                     shared.take<uint64_t>(1), best.capacity, best.k};
  if (tid == 0) list.clear();
  __syncthreads();
  for (int64_t i = 0; i < hits; i += kLanes)
    offer_all(list, i + tid < hits ? best.lists[q * hits + i + tid] : kNoHit);
  list.shrink(WholeBlock{});
  for (int i = tid; i < best.k; i += kLanes) {
    const uint64_t hit = list.hits[i];
    const bool none = hit == kNoHit;
    scores[q * best.k + i] = none ? __uint_as_float(0xff800000)
                                  : device_float_from_key(~static_cast<uint32_t>(hit >> 32));
    ids[q * best.k + i] = none ? -1 : static_cast<int64_t>(hit & 0xffffffffu);
  }
}

size_t list_bytes(int capacity) {
  return shared_bytes<uint64_t>(capacity) + shared_bytes<int>(1) + shared_bytes<uint64_t>(1);
}

}  // namespace

int64_t search_scratch(int64_t queries, int64_t documents, int64_t k) {
  return queries * ceil_div(documents, kWindowRows) * k * static_cast<int64_t>(sizeof(uint64_t));
}

void search(const CudaStream& stream, const Inverted& docs, const Rows<float>& queries, int64_t k,
            float* scores, int64_t* ids, void* scratch) {
  if (queries.rows == 0 || k == 0) return;
  const Best best{static_cast<int>(k), capacity_for(k), ceil_div(docs.documents, kWindowRows),
                  static_cast<uint64_t*>(scratch)};
  if (best.windows)
    launch(stream, "sparse: search_windows", search_windows,
           Grid{blocks_of(best.windows * queries.rows), kLanes,
                shared_bytes<double>(kWindowRows) + 2 * shared_bytes<int64_t>(kTermsAtOnce) +
                    shared_bytes<float>(kTermsAtOnce) + list_bytes(best.capacity)},
           docs, queries, best);
  launch(stream, "sparse: merge_windows", merge_windows,
         Grid{blocks_of(queries.rows), kLanes, list_bytes(best.capacity)}, best, scores, ids);
}

}  // namespace pentad::sparse::cuda
