// SPDX-License-Identifier: Apache-2.0
// The k best of a stream of hits, in shared memory: lanes offer what beats the limit, and where the
// list is full a group of lanes sorts it and keeps k, whose last is the new limit. Hits are unique
// numbers, so which k remain depends neither on the order of the offers nor on the split of the rows.
#pragma once
#include "common/cuda_launch.cuh"

namespace pentad {

// (key, row) as one number: smaller is better, equal keys by row.
constexpr uint64_t kNoHit = ~uint64_t{0};
__device__ inline uint64_t hit_of(uint32_t key, int64_t row) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(row);
}

// The order-preserving map of floats to keys, and back, as in common/topk.h.
__device__ inline uint32_t device_key_from_float(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float device_float_from_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Lanes that work on one list together.
struct WholeWarp {
  __device__ int rank() const { return lane_of_warp(); }
  __device__ int size() const { return 32; }
  __device__ void sync() const { __syncwarp(); }
};
struct WholeBlock {
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }
};

// Rising order; `count` is a power of two. A bitonic network: log2(count)^2 / 2 steps of count / 2
// comparisons, each ended by a barrier of the group.
template <class Group>
__device__ void sort_hits(const Group& group, uint64_t* hits, int count) {
  for (int run = 2; run <= count; run *= 2) {
    for (int by = run / 2; by; by /= 2) {
      group.sync();
      for (int i = group.rank(); i < count / 2; i += group.size()) {
        const int low = (i & ~(by - 1)) * 2 + (i & (by - 1)), high = low + by;
        const uint64_t a = hits[low], b = hits[high];
        if ((a > b) == ((low & run) == 0)) {
          hits[low] = b;
          hits[high] = a;
        }
      }
    }
  }
  group.sync();
}

// One query's list. Between two barriers lanes either offer, at most capacity - k in all, or shrink.
struct HitList {
  uint64_t* hits;   // (capacity), a power of two > k
  int* count;       // of hits
  uint64_t* limit;  // a hit is smaller
  int capacity, k;

  __device__ void clear() const {
    *count = 0;
    *limit = kNoHit;
  }
  __device__ void offer(uint64_t hit) const {
    if (hit < *limit) hits[atomicAdd(count, 1)] = hit;
  }
  // Sorts and keeps the k best.
  template <class Group>
  __device__ void shrink(const Group& group) const {
    const int found = *count;
    for (int i = found + group.rank(); i < capacity; i += group.size()) hits[i] = kNoHit;
    sort_hits(group, hits, capacity);
    if (group.rank() == 0) {
      *count = found < k ? found : k;
      if (found >= k) *limit = hits[k - 1];
    }
    group.sync();
  }
};

inline int power_of_two_from(int64_t least) {
  int power = 1;
  while (power < least) power *= 2;
  return power;
}

}  // namespace pentad
