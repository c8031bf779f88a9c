// SPDX-License-Identifier: Apache-2.0
// The search over codes against its definition, every level, odd sizes.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "pq/code_scan.h"
#include "pq/code_scan_reference.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937 generator(11);

int64_t draw(std::initializer_list<int64_t> of) {
  return of.begin()[std::uniform_int_distribution<size_t>(0, of.size() - 1)(generator)];
}
bool chance(double p) { return std::bernoulli_distribution(p)(generator); }

struct Case {
  Layout layout;
  int64_t n, nq, used;
  std::vector<uint8_t> codes, blocks, mask;
  std::vector<float> tables, offset, scale, bias;
  std::vector<int64_t> ids;
  Database database;
  Queries queries;

  Case() {
    layout = {static_cast<int>(draw({4, 6, 8})), draw({1, 3, 7, 8, 16, 17, 33, 64})};
    n = draw({1, 63, 64, 65, 700, 6001}), nq = draw({1, 2, 5, 9, 70});
    used = chance(0.7) ? layout.subspaces : 1 + layout.subspaces / 2;
    std::uniform_int_distribution<int> code(0, static_cast<int>(layout.entries()) - 1);
    for (int64_t i = 0; i < n * layout.subspaces; ++i)
      codes.push_back(static_cast<uint8_t>(code(generator)));
    blocks.assign((n + kBlockRows - 1) / kBlockRows * layout.block_bytes(), 0);
    const int64_t half = n / 2;  // in two writes, the second into the middle of a block
    Matrix<const uint8_t> part{codes.data(), half, layout.subspaces, layout.subspaces, 1};
    to_blocks(part, layout, 0, blocks.data());
    part.data = codes.data() + half * layout.subspaces, part.rows = n - half;
    to_blocks(part, layout, half, blocks.data());
    std::normal_distribution<float> normal;
    const bool ties = chance(0.3);  // few different costs
    // With 10^38 sums overflow, and with them the bounds.
    const float size = std::pow(10.0f, static_cast<float>(draw({-3, 0, 4, 38})));
    for (int64_t i = 0; i < nq * used * layout.entries(); ++i)
      tables.push_back(
          size *
          std::clamp(ties ? static_cast<float>(draw({0, 1, 2})) : normal(generator), -3.0f, 3.0f));
    for (int64_t q = 0; q < nq; ++q) offset.push_back(normal(generator));
    for (int64_t i = 0; i < n; ++i) {
      mask.push_back(chance(0.2));
      scale.push_back(std::fabs(normal(generator)));
      bias.push_back(normal(generator));
      ids.push_back(7 * ((i * 31) % n));
    }
    database.blocks = {blocks.data(), layout, n};
    if (chance(0.4)) database.mask = mask.data();
    if (chance(0.3)) database.scale = scale.data(), database.bias = bias.data();
    if (n % 31 && chance(0.4)) database.ids = ids.data();
    queries = {tables.data(), nq, used, chance(0.5) ? offset.data() : nullptr};
  }

  std::vector<std::pair<float, int64_t>> ranking(int64_t q) const {
    const auto costs = reference::costs(
        codes, layout.subspaces, tables.data() + q * used * layout.entries(), used,
        layout.entries(), queries.offset ? offset[q] : 0.0f, database.scale, database.bias);
    return reference::ranking(costs, database.mask, database.ids);
  }
};

void round_trip(const Case& c) {
  std::vector<int64_t> at(c.n);
  std::iota(at.begin(), at.end(), 0);
  std::shuffle(at.begin(), at.end(), generator);
  std::vector<uint8_t> back(c.codes.size());
  from_blocks(c.database.blocks, at.data(), c.n, back.data());
  const int64_t M = c.layout.subspaces;
  for (int64_t i = 0; i < c.n; ++i)
    CHECK(std::equal(back.data() + i * M, back.data() + (i + 1) * M, c.codes.data() + at[i] * M),
          c.layout.nbits, M, i);
}

void best(const Case& c, int64_t k) {
  std::vector<float> values(c.nq * k);
  std::vector<int64_t> found(c.nq * k);
  topk(c.queries, c.database, nullptr, k, values.data(), found.data());
  for (int64_t q = 0; q < c.nq; ++q) {
    const auto expected = c.ranking(q);
    for (int64_t i = 0; i < k; ++i) {
      const bool present = i < static_cast<int64_t>(expected.size());
      CHECK(found[q * k + i] == (present ? expected[i].second : -1) &&
                values[q * k + i] == (present ? expected[i].first : INFINITY),
            name(isa()), c.layout.nbits, c.layout.subspaces, c.used, c.n, q, i);
    }
  }
}

void within(const Case& c) {
  const auto first = c.ranking(0);
  const float radius = first.empty() ? 0.0f : first[first.size() / 3].first;
  const RangeResult result(c.queries, c.database, nullptr, radius);
  std::vector<int64_t> indptr(c.nq + 1), ids(result.total());
  std::vector<float> values(result.total());
  result.write(indptr.data(), values.data(), ids.data());
  for (int64_t q = 0; q < c.nq; ++q) {
    std::vector<std::pair<int64_t, float>> expected;
    for (const auto& [cost, id] : c.ranking(q))
      if (cost <= radius) expected.emplace_back(id, cost);
    std::sort(expected.begin(), expected.end());
    bool same = indptr[q + 1] - indptr[q] == static_cast<int64_t>(expected.size());
    for (size_t i = 0; same && i < expected.size(); ++i)
      same = ids[indptr[q] + i] == expected[i].first && values[indptr[q] + i] == expected[i].second;
    CHECK(same, name(isa()), c.layout.nbits, c.layout.subspaces, c.n, q);
  }
}

// Each query visits every second run of rows, one table serving a run.
void lists(const Case& c) {
  const int64_t step = 2 * kBlockRows, k = 5;
  std::vector<int64_t> offsets{0}, begin, end, table;
  std::vector<float> offset;
  for (int64_t q = 0; q < c.nq; ++q) {
    for (int64_t row = q % 2 * kBlockRows; row < c.n; row += step) {
      begin.push_back(row);
      end.push_back(std::min(c.n, row + kBlockRows - q % 3));
      if (end.back() < row) end.back() = row;
      table.push_back((q + row / step) % c.nq);
      offset.push_back(static_cast<float>(row) * 0.25f);
    }
    offsets.push_back(static_cast<int64_t>(begin.size()));
  }
  const Ranges ranges{offsets.data(), begin.data(), end.data(), table.data(), offset.data()};
  std::vector<float> values(c.nq * k);
  std::vector<int64_t> found(c.nq * k);
  topk(c.queries, c.database, &ranges, k, values.data(), found.data());
  for (int64_t q = 0; q < c.nq; ++q) {
    std::vector<std::pair<float, int64_t>> expected;
    for (int64_t i = offsets[q]; i < offsets[q + 1]; ++i) {
      const auto costs = reference::costs(
          c.codes, c.layout.subspaces, c.tables.data() + table[i] * c.used * c.layout.entries(),
          c.used, c.layout.entries(), offset[i], c.database.scale, c.database.bias);
      for (int64_t row = begin[i]; row < end[i]; ++row)
        if (!c.database.mask || c.mask[row])
          expected.emplace_back(costs[row], c.database.ids ? c.ids[row] : row);
    }
    std::sort(expected.begin(), expected.end());
    for (int64_t i = 0; i < k; ++i) {
      const bool present = i < static_cast<int64_t>(expected.size());
      CHECK(found[q * k + i] == (present ? expected[i].second : -1) &&
                (!present || values[q * k + i] == expected[i].first),
            name(isa()), c.layout.nbits, c.layout.subspaces, c.n, q, i);
    }
  }
}

}  // namespace

int main() {
  for (const Isa level : isa_available()) {
    set_isa(level);
    for (int round = 0; round < 60; ++round) {
      set_num_threads(1 + round % 3);
      const Case c;
      round_trip(c);
      best(c, draw({1, 3, 10, 100}));
      within(c);
      lists(c);
    }
  }
  return report();
}
