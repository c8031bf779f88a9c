// SPDX-License-Identifier: Apache-2.0
#include "common/topk.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "common/parallel.h"

namespace pentad {

void start_hits(HitBuffer& buffer, int64_t k, uint32_t limit, bool ordered) {
  // Twice k makes each selection pay for k insertions; the slack keeps small k from selecting
  // often.
  buffer.capacity = k > 0 ? 2 * k + 16 : 0;
  buffer.items = k > 0 ? static_cast<Hit*>(std::malloc(sizeof(Hit) * buffer.capacity)) : nullptr;
  if (k > 0 && !buffer.items) throw std::bad_alloc();
  buffer.size = 0;
  buffer.k = k;
  buffer.limit = limit;
  buffer.ordered = ordered;
}

void free_hits(HitBuffer& buffer) {
  std::free(buffer.items);
  buffer.items = nullptr;
}

namespace {

// The rank-th smallest key (from 0), a byte at a time from the top: histograms instead of a
// quickselect's comparisons, half of which a processor mispredicts. Bytes that all keys share are
// skipped, so counts of bits take two passes.
uint32_t key_of_rank(const HitBuffer& buffer, int64_t rank) {
  uint32_t key = buffer.items[0].key, differing = 0;
  for (int64_t i = 0; i < buffer.size; ++i) differing |= buffer.items[i].key ^ key;
  uint32_t known = 0;  // bits of `key` that are settled
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t byte = 255u << shift;
    if (differing & byte) {
      int32_t histogram[256] = {};
      for (int64_t i = 0; i < buffer.size; ++i)
        if (((buffer.items[i].key ^ key) & known) == 0)
          ++histogram[buffer.items[i].key >> shift & 255];
      uint32_t digit = 0;
      while (rank >= histogram[digit]) rank -= histogram[digit++];
      key = (key & ~byte) | digit << shift;
    }
    known |= byte;
  }
  return key;
}

// Keeps the k best of more than k hits, in their order where ids rise. Returns the k-th key.
uint32_t keep_best(HitBuffer& buffer) {
  if (!buffer.ordered) {
    std::nth_element(buffer.items, buffer.items + buffer.k - 1, buffer.items + buffer.size);
    buffer.size = buffer.k;
    return buffer.items[buffer.k - 1].key;
  }
  const uint32_t worst = key_of_rank(buffer, buffer.k - 1);
  int64_t ties = buffer.k;  // how many hits with the k-th key have room: the first ones
  for (int64_t i = 0; i < buffer.size; ++i) ties -= buffer.items[i].key < worst;
  int64_t kept = 0;
  for (int64_t i = 0; i < buffer.size; ++i) {
    const Hit hit = buffer.items[i];
    const bool tie = hit.key == worst && ties > 0;
    ties -= tie;
    buffer.items[kept] = hit;
    kept += hit.key < worst || tie;
  }
  buffer.size = kept;
  return worst;
}

// Stable, by key, a byte at a time from the bottom.
void sort_by_key(Hit* items, int64_t size) {
  std::vector<Hit> other(size);
  Hit *from = items, *to = other.data();
  uint32_t differing = 0;
  for (int64_t i = 0; i < size; ++i) differing |= items[i].key ^ items[0].key;
  for (int shift = 0; shift < 32; shift += 8) {
    if (!(differing >> shift & 255)) continue;
    int64_t start[257] = {};
    for (int64_t i = 0; i < size; ++i) ++start[(from[i].key >> shift & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) start[digit + 1] += start[digit];
    for (int64_t i = 0; i < size; ++i) to[start[from[i].key >> shift & 255]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::copy(from, from + size, items);
}

}  // namespace

void make_room(HitBuffer& buffer) {
  if (buffer.k == 0) {
    const int64_t capacity = std::max<int64_t>(64, buffer.capacity * 2);
    void* grown = std::realloc(buffer.items, sizeof(Hit) * capacity);
    if (!grown) throw std::bad_alloc();
    buffer.items = static_cast<Hit*>(grown);
    buffer.capacity = capacity;
    return;
  }
  const uint32_t worst = keep_best(buffer);
  buffer.limit = std::min(buffer.limit, buffer.ordered ? worst : worst + 1);
}

void finish_hits(HitBuffer& buffer) {
  if (buffer.k == 0) {
    std::sort(buffer.items, buffer.items + buffer.size,
              [](const Hit& a, const Hit& b) { return a.id < b.id; });
    return;
  }
  if (buffer.size > buffer.k) keep_best(buffer);
  constexpr int64_t kSmall = 200;  // where a comparison sort is as fast
  if (buffer.ordered && buffer.size > kSmall) sort_by_key(buffer.items, buffer.size);
  else std::sort(buffer.items, buffer.items + buffer.size);
}

void best_of(const float* scores, const int64_t* ids, int64_t queries, int64_t candidates,
             bool largest, int64_t k, float* best, int64_t* best_ids) {
  constexpr int64_t kStep = 16;  // queries
  const int64_t keep = std::min(k, candidates);
  const auto task = [&](int64_t t) {
    std::vector<Hit> hits(candidates);
    for (int64_t q = t * kStep; q < queries && q < (t + 1) * kStep; ++q) {
      for (int64_t i = 0; i < candidates; ++i) {
        const float score = scores[q * candidates + i];
        // Adding 0 makes one of both zeros.
        hits[i] = {key_from_float((largest ? -score : score) + 0.0f), ids[q * candidates + i]};
      }
      std::partial_sort(hits.begin(), hits.begin() + keep, hits.end());
      for (int64_t i = 0; i < keep; ++i) {
        const float score = float_from_key(hits[i].key);
        best[q * k + i] = (largest ? -score : score) + 0.0f;
        best_ids[q * k + i] = hits[i].id;
      }
    }
  };
  constexpr int64_t kSerialWork = 1 << 14;  // candidates below which threads do not pay
  parallel_for_if(queries * candidates >= kSerialWork, (queries + kStep - 1) / kStep, task);
}

uint32_t key_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float float_from_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace pentad
