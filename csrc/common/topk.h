// SPDX-License-Identifier: Apache-2.0
// Collecting the hits of a scan: a kernel compares a whole vector of keys with `limit`, and appends
// only the few that pass. For a top-k search the buffer is a reservoir: when it is full, the k best
// are kept and the limit drops to the k-th key. For a range search it grows and the limit stays.
//
// Keys are 32-bit and smaller is better, so that (key, id) is a total order: the result does not
// depend on the order of the scan, the number of threads or the split of the data.
#pragma once
#include <cstdint>

namespace pentad {

struct Hit {
  uint32_t key;
  int64_t id;
};

inline bool operator<(const Hit& a, const Hit& b) {
  return a.key != b.key ? a.key < b.key : a.id < b.id;
}

struct HitBuffer {
  Hit* items = nullptr;
  int64_t size = 0;
  int64_t capacity = 0;
  int64_t k = 0;        // 0: a range search, keep everything
  uint32_t limit = 0;   // a hit has key < limit
  bool ordered = true;  // ids rise along the scan, so a later key equal to the k-th cannot win
};

// Makes room in a full buffer, as described above. Throws std::bad_alloc when it cannot grow.
void make_room(HitBuffer& buffer);

// Prepares a reservoir for the k best keys below `limit`, or, with k = 0, for all of them.
void start_hits(HitBuffer& buffer, int64_t k, uint32_t limit, bool ordered);
void free_hits(HitBuffer& buffer);

// Sorts the hits and drops all but the k best (range search: sorts by id, keeps all).
void finish_hits(HitBuffer& buffer);

// Order-preserving map of finite floats and infinities to keys, and back.
uint32_t key_from_float(float value);
float float_from_key(uint32_t key);

// The k best of (queries, candidates) by (score, id), best first; fewer than k candidates leave the
// rest as they are. Arrays are contiguous, results (queries, k).
void best_of(const float* scores, const int64_t* ids, int64_t queries, int64_t candidates,
             bool largest, int64_t k, float* best, int64_t* best_ids);

}  // namespace pentad
