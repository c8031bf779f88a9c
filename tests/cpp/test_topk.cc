// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "common/topk.h"

using namespace pentad;

namespace {

// Pushes every hit under the limit, as a kernel does.
void push(HitBuffer& buffer, const Hit& hit) {
  if (hit.key >= buffer.limit) return;
  if (buffer.size == buffer.capacity) {
    make_room(buffer);
    if (hit.key >= buffer.limit) return;
  }
  buffer.items[buffer.size++] = hit;
}

void keeps_the_k_best(bool ordered) {
  std::mt19937 random(ordered);
  for (int64_t k : {1, 2, 10, 100, 5000}) {
    for (int64_t n : {0, 1, 100, 3000}) {
      for (uint32_t range : {1u, 3u, 1000000u}) {  // 1 and 3: heavy ties
        std::vector<Hit> all(n);
        for (int64_t i = 0; i < n; ++i) all[i] = {static_cast<uint32_t>(random() % range), i};
        if (!ordered) std::shuffle(all.begin(), all.end(), random);
        HitBuffer buffer;
        start_hits(buffer, k, 65535, ordered);
        for (Hit hit : all) {
          hit.key %= 65535;
          push(buffer, hit);
        }
        finish_hits(buffer);
        for (Hit& hit : all) hit.key %= 65535;
        std::sort(all.begin(), all.end());
        const int64_t expected = std::min(k, n);
        CHECK(buffer.size == expected, k, n, range, buffer.size);
        for (int64_t i = 0; i < std::min(expected, buffer.size); ++i)
          CHECK(buffer.items[i].key == all[i].key && buffer.items[i].id == all[i].id, k, n, range,
                i);
        free_hits(buffer);
      }
    }
  }
}

void a_range_search_keeps_all() {
  HitBuffer buffer;
  start_hits(buffer, 0, 10, true);
  for (int64_t i = 9999; i >= 0; --i) push(buffer, {static_cast<uint32_t>(i % 20), i});
  finish_hits(buffer);
  CHECK(buffer.size == 5000, buffer.size);
  for (int64_t i = 1; i < buffer.size; ++i) CHECK(buffer.items[i - 1].id < buffer.items[i].id, i);
  free_hits(buffer);
}

void float_keys_keep_the_order() {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> rising = {-infinity, -3e38f, -1.0f, -1e-45f, 0.0f,
                                     1e-45f,    1.0f,   3e38f, infinity};
  for (size_t i = 0; i < rising.size(); ++i) {
    CHECK(float_from_key(key_from_float(rising[i])) == rising[i], rising[i]);
    if (i) CHECK(key_from_float(rising[i - 1]) < key_from_float(rising[i]), rising[i]);
  }
}

}  // namespace

int main() {
  keeps_the_k_best(true);
  keeps_the_k_best(false);
  a_range_search_keeps_all();
  float_keys_keep_the_order();
  return report();
}
