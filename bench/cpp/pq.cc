// SPDX-License-Identifier: Apache-2.0
// The kernels of product quantization alone, per instruction-set level, each checked first: the scan
// of codes against brute force, assignment and lookup against their definitions.
//
//   bench_pq [--quick]
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "pq/assign.h"
#include "pq/code_scan.h"
#include "pq/lookup.h"
#include "pq/table_sum.h"
#include "timing.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937_64 random_bits(1);

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> out(count);
  for (float& x : out) x = draw(random_bits);
  return out;
}

std::vector<uint8_t> random_codes(int64_t count, int64_t entries) {
  std::vector<uint8_t> out(count);
  for (uint8_t& code : out) code = static_cast<uint8_t>(random_bits() % entries);
  return out;
}

// --- Scan ----------------------------------------------------------------------------------------

// Brute force over the first query.
bool first_is_right(const std::vector<float>& tables, const std::vector<uint8_t>& codes, int64_t n,
                    int64_t M, int64_t entries, int64_t k, const float* values,
                    const int64_t* ids) {
  std::vector<std::pair<float, int64_t>> all(n);
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t m = 0; m < M; ++m) sum += tables[m * entries + codes[i * M + m]];
    all[i] = {sum, i};
  }
  std::partial_sort(all.begin(), all.begin() + k, all.end());
  for (int64_t i = 0; i < k; ++i)
    if (values[i] != all[i].first || ids[i] != all[i].second) return false;
  return true;
}

bool scan(bool quick) {
  constexpr int64_t k = 10, dsub = 4;
  const int64_t n = quick ? 20000 : 1000000;
  const int rounds = quick ? 3 : 7;
  std::printf("level  bits     M  queries   G rows/s   G lookups/s\n");
  for (const auto& [nbits, M] :
       {std::pair<int, int64_t>{4, 16}, {4, 32}, {4, 64}, {6, 16}, {8, 16}, {8, 32}}) {
    const Layout layout{nbits, M};
    const int64_t entries = layout.entries();
    const std::vector<uint8_t> codes = random_codes(n * M, entries);
    const int64_t bytes = (n + kBlockRows - 1) / kBlockRows * layout.block_bytes();
    const AlignedBuffer<uint8_t> blocks = aligned_buffer<uint8_t>(bytes);
    std::memset(blocks.get(), 0, bytes);
    to_blocks({codes.data(), n, M, M, 1}, layout, 0, blocks.get());
    const std::vector<float> queries = normal(256 * M * dsub), books = normal(M * entries * dsub);
    std::vector<float> all_tables(256 * M * entries);
    score_tables({DType::f32,
                  256,
                  M,
                  entries,
                  dsub,
                  queries.data(),
                  M * dsub,
                  1,
                  books.data(),
                  {entries * dsub, dsub, 1},
                  false},
                 all_tables.data());
    Database database;
    database.blocks = {blocks.get(), layout, n};
    for (Isa level : isa_available()) {
      set_isa(level);
      for (int64_t nq : {1, 32, 256}) {
        std::vector<float> values(nq * k);
        std::vector<int64_t> ids(nq * k);
        const Queries asked{all_tables.data(), nq, M, nullptr};
        const double seconds = median_seconds(
            rounds, [&] { topk(asked, database, nullptr, k, values.data(), ids.data()); });
        if (!first_is_right(all_tables, codes, n, M, entries, k, values.data(), ids.data())) {
          std::printf("%s %d bits: wrong answer\n", name(level), nbits);
          return false;
        }
        const double rows = nq * n / seconds / 1e9;
        std::printf("%-5s %5d %5ld %8ld %10.3f %13.1f\n", name(level), nbits, static_cast<long>(M),
                    static_cast<long>(nq), rows, rows * M);
      }
    }
  }
  return true;
}

// --- Assignment ----------------------------------------------------------------------------------

bool assignment(bool quick) {
  const int rounds = quick ? 3 : 5;
  std::printf("\nlevel       n    M     K  dim     seconds     GF/s   (assign, l2)\n");
  for (const auto& [M, K, dim] :
       {std::array<int64_t, 3>{16, 256, 8}, {32, 16, 4}, {1, quick ? 256 : 4096, 64}}) {
    const int64_t n = quick ? 2000 : 50000, checked = std::min<int64_t>(n, 500);
    const std::vector<float> x = normal(n * M * dim), books = normal(M * K * dim);
    const Array3 rows{x.data(), DType::f32, {n, M, dim}, {M * dim, dim, 1}};
    const Array3 centroids{books.data(), DType::f32, {M, K, dim}, {K * dim, dim, 1}};
    std::vector<int32_t> expected(checked * M), codes(n * M);
    Array3 some = rows;
    some.shape[0] = checked;
    assign_reference(some, centroids, Nearest::l2, {expected.data(), true, 1, nullptr});
    for (Isa level : isa_available()) {
      set_isa(level);
      const double seconds = median_seconds(
          rounds, [&] { assign(rows, centroids, Nearest::l2, {codes.data(), true, 1, nullptr}); });
      if (!std::equal(expected.begin(), expected.end(), codes.begin())) {
        std::printf("%s: wrong codes\n", name(level));
        return false;
      }
      std::printf("%-5s %7ld %4ld %5ld %4ld %11.4f %8.1f\n", name(level), static_cast<long>(n),
                  static_cast<long>(M), static_cast<long>(K), static_cast<long>(dim), seconds,
                  2e-9 * n * M * K * dim / seconds);
    }
  }
  return true;
}

// --- Lookup --------------------------------------------------------------------------------------

bool lookups(bool quick) {
  const int rounds = quick ? 3 : 7;
  const int64_t n = quick ? 2000 : 200000, M = 16, entries = 256, width = 16;
  const std::vector<uint8_t> codes = random_codes(n * M, entries);
  const std::vector<float> values = normal(M * entries * width);
  Lookup problem;
  problem.codes = {codes.data(), DType::u8, n, M, M, 1};
  problem.width = width;
  for (int64_t m = 0; m < M; ++m) {
    Table table{};
    table.base = reinterpret_cast<const char*>(values.data() + m * entries * width);
    table.step = width * static_cast<int64_t>(sizeof(float));
    table.rows = entries;
    problem.tables.push_back(table);
  }
  std::printf("\nlevel  combine     GB/s written   (lookup, M 16, K 256, width 16)\n");
  for (Combine combine : {Combine::concat, Combine::sum}) {
    problem.combine = combine;
    std::vector<float> out(n * problem.out_width()), expected(out.size());
    reference_lookup(problem, expected.data());
    for (Isa level : isa_available()) {
      set_isa(level);
      const double seconds = median_seconds(rounds, [&] { lookup(problem, out.data()); });
      if (out != expected) {
        std::printf("%s: wrong rows\n", name(level));
        return false;
      }
      std::printf("%-5s  %-8s %14.1f\n", name(level), combine == Combine::sum ? "sum" : "concat",
                  out.size() * sizeof(float) / seconds / 1e9);
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
  std::printf("%d threads, %s\n\n", num_threads(), thread_runtime());
  return scan(quick) && assignment(quick) && lookups(quick) ? 0 : 1;
}
