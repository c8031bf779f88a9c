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
    typedef uint64_t Vec __attribute__((vector_size(16), aligned(1), may_alias));
    const uint8_t* p = data + chunk * kChunk;
    const uint8_t* end = data + std::min(bytes, (chunk + 1) * kChunk);
    // Four streams a thread: one alone leaves the core waiting for its prefetcher.
    const int64_t quarter = (end - p) / 4 / 64 * 64;
    Vec sums[4] = {};
    for (int64_t i = 0; i < quarter; i += 64)
      for (int stream = 0; stream < 4; ++stream)
        for (int j = 0; j < 64; j += 16)
          sums[stream] += *reinterpret_cast<const Vec*>(p + stream * quarter + i + j);
    p += 4 * quarter;
    uint64_t sum = 0;
    for (const Vec& v : sums) sum += v[0] + v[1];
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
