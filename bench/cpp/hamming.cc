// SPDX-License-Identifier: Apache-2.0
// The search kernel alone, per instruction-set level: G pairs/s and GB/s of codes, checked first.
//
//   bench_hamming [--quick]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/stream_read.h"
#include "hamming/hamming.h"
#include "timing.h"

using namespace pentad;
using namespace pentad::hamming;

namespace {

// Brute force over the first query.
bool first_is_right(const std::vector<uint8_t>& queries, const std::vector<uint8_t>& codes,
                    int64_t n, int64_t bytes, int64_t k, const int32_t* values,
                    const int64_t* ids) {
  std::vector<std::pair<int32_t, int64_t>> all(n);
  for (int64_t i = 0; i < n; ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; j < bytes; ++j)
      sum += __builtin_popcount(queries[j] ^ codes[i * bytes + j]);
    all[i] = {sum, i};
  }
  std::partial_sort(all.begin(), all.begin() + k, all.end());
  for (int64_t i = 0; i < k; ++i)
    if (values[i] != all[i].first || ids[i] != all[i].second) return false;
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
  const int64_t n = quick ? 50000 : 1000000;
  const int rounds = quick ? 3 : 7;
  std::mt19937_64 random(1);

  std::vector<uint8_t> memory(quick ? 64 << 20 : 512 << 20, 1);
  const double read = memory.size() / median_seconds(rounds, [&] {
                        volatile uint64_t sum = stream_read(memory.data(), memory.size());
                        (void)sum;
                      });
  std::printf("%d threads, %s; read bandwidth %.1f GB/s\n\n", num_threads(), thread_runtime(),
              read / 1e9);
  std::printf("level  bits  queries     k   G pairs/s   GB/s of codes\n");
  for (int64_t bits : {256, 1024}) {
    const int64_t bytes = bits / 8, words = words_for(bytes);
    std::vector<uint8_t> codes(n * bytes), queries(256 * bytes);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
    for (uint8_t& byte : queries) byte = static_cast<uint8_t>(random());
    const AlignedBuffer<uint16_t> blocks =
        aligned_buffer<uint16_t>((n + kBlockRows - 1) / kBlockRows * kBlockRows * words);
    to_blocks({codes.data(), n, bytes, bytes, 1}, blocks.get(), nullptr, 0, words);
    Database database;
    database.blocks = {blocks.get(), nullptr, n, words};
    for (Isa level : isa_available()) {
      set_isa(level);
      for (int64_t nq : {1, 8, 256}) {
        constexpr int64_t k = 10;
        std::vector<int32_t> values(nq * k);
        std::vector<int64_t> ids(nq * k);
        const double seconds = median_seconds(rounds, [&] {
          topk({queries.data(), nq, bytes, bytes, 1}, database, Metric::hamming, k, values.data(),
               ids.data());
        });
        if (!first_is_right(queries, codes, n, bytes, k, values.data(), ids.data())) {
          std::printf("%s %ld bits: wrong answer\n", name(level), static_cast<long>(bits));
          return 1;
        }
        std::printf("%-5s %5ld %8ld %5ld %11.3f %15.1f\n", name(level), static_cast<long>(bits),
                    static_cast<long>(nq), static_cast<long>(k), nq * n / seconds / 1e9,
                    n * bytes / seconds / 1e9);
      }
    }
  }
  return 0;
}
