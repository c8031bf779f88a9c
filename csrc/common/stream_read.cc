// SPDX-License-Identifier: Apache-2.0
#include "common/stream_read.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.h"

namespace pentad {

uint64_t stream_read(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kChunk = int64_t{1} << 20;
  std::atomic<uint64_t> total{0};
  parallel_for((bytes + kChunk - 1) / kChunk, [&](int64_t chunk) {
    typedef uint64_t Vec __attribute__((vector_size(64), aligned(1)));
    const uint8_t* p = data + chunk * kChunk;
    const uint8_t* end = data + std::min(bytes, (chunk + 1) * kChunk);
    Vec sums[4] = {};
    for (; end - p >= 256; p += 256)
      for (int i = 0; i < 4; ++i) sums[i] += reinterpret_cast<const Vec*>(p)[i];
    uint64_t sum = 0;
    for (const Vec& v : sums)
      for (int i = 0; i < 8; ++i) sum += v[i];
    for (; p < end; p += 8) {
      uint64_t word = 0;
      std::memcpy(&word, p, std::min<int64_t>(8, end - p));
      sum += word;
    }
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace pentad
