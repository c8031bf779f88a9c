// SPDX-License-Identifier: Apache-2.0
// The search in inverted lists against its definition, every level; windows and their checks.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "sparse/search.h"
#include "sparse/search_drive.h"
#include "sparse/search_reference.h"

using namespace pentad;
using namespace pentad::sparse;

namespace {

std::mt19937 generator(5);

int64_t draw(std::initializer_list<int64_t> of) {
  return of.begin()[std::uniform_int_distribution<size_t>(0, of.size() - 1)(generator)];
}
bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }

struct Rows {
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> terms;
  std::vector<float> values;

  // `most` terms a row at most, of a vocabulary in which the first ones are frequent.
  void add(int64_t vocabulary, int64_t most, bool negative, double size) {
    std::set<int32_t> row;
    for (int64_t i = below(most + 1); i > 0; --i)
      row.insert(static_cast<int32_t>(chance(0.5) ? below(std::min<int64_t>(vocabulary, 12))
                                                  : below(vocabulary)));
    std::exponential_distribution<double> value;
    for (int32_t term : row) {
      terms.push_back(term);
      const double sign = negative && chance(0.2) ? -1 : 1;
      const double v = chance(0.5) ? value(generator) : static_cast<double>(below(3));
      values.push_back(static_cast<float>(sign * size * v));
    }
    indptr.push_back(static_cast<int64_t>(terms.size()));
  }
};

struct BuiltWindow {
  std::vector<int32_t> terms;
  std::vector<int64_t> starts;
  std::vector<float> scales;
  std::vector<uint8_t> postings;
  int64_t documents;

  BuiltWindow(const Forward& forward, int64_t first, int64_t last) : documents(last - first) {
    const WindowBuilder builder(forward, first, last);
    terms.resize(builder.count()), starts.resize(builder.count() + 1);
    scales.resize(builder.count()), postings.resize(builder.bytes() + 1);
    builder.write(terms.data(), starts.data(), scales.data(), postings.data());
  }
  Window view() const {
    return {terms.data(),
            starts.data(),
            scales.data(),
            postings.data(),
            static_cast<int64_t>(terms.size()),
            static_cast<int64_t>(postings.size()) - 1,
            documents};
  }
};

struct Index {
  Rows rows;
  std::vector<uint8_t> bytes, mask;
  std::vector<float> scale;
  std::vector<BuiltWindow> built;
  Documents documents;

  Index(int64_t n, int64_t vocabulary, int64_t most) {
    for (int64_t i = 0; i < n; ++i) {
      rows.add(vocabulary, most, false, 1);
      bytes.resize(rows.terms.size());
      mask.push_back(chance(0.3));
      scale.push_back(static_cast<float>(1 + below(5)) / 7);
    }
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(below(256));
    Forward& f = documents.forward;
    f = {rows.indptr.data(),
         rows.terms.data(),
         rows.values.data(),
         DType::f32,
         nullptr,
         n,
         static_cast<int64_t>(rows.terms.size())};
    if (chance(0.3)) f.values = bytes.data(), f.dtype = DType::u8, f.scale = scale.data();
    for (int64_t i = 0; i < n; i += kWindow) built.emplace_back(f, i, std::min(n, i + kWindow));
    for (const BuiltWindow& window : built) {
      documents.windows.push_back(window.view());
      CHECK(defect_of(window.view()) == nullptr);
    }
    if (chance(0.4)) documents.mask = mask.data();
  }
};

SparseQueries view(const Rows& rows) {
  return {rows.indptr.data(), rows.terms.data(), rows.values.data(),
          static_cast<int64_t>(rows.indptr.size()) - 1};
}

void test_search() {
  for (int round = 0; round < 120; ++round) {
    const bool large = round % 40 == 3;
    const int64_t n = large ? kWindow + 70 : draw({1, 63, 64, 65, 300, 1500});
    const int64_t vocabulary = draw({1, 20, 500, int64_t{1} << 31});
    const Index index(n, std::min<int64_t>(vocabulary, 2147483647), large ? 4 : 12);
    Rows rows;
    const int64_t most = draw({0, 3, 15, 300});
    for (int64_t q = draw({1, 2, 40}); q > 0; --q)
      rows.add(std::min<int64_t>(vocabulary, 2147483647), most, chance(0.3),
               std::pow(10.0, static_cast<double>(draw({-44, -25, 0, 0, 25}))));
    const SparseQueries queries = view(rows);
    for (int64_t k : {int64_t{1}, draw({3, 10, 200}), n + 2}) {
      if (large && k > 200) continue;
      std::vector<float> want(queries.count * k), got(want.size(), -7);
      std::vector<int64_t> want_at(want.size()), got_at(want.size(), -7);
      topk_reference(index.documents, queries, k, want.data(), want_at.data());
      for (int threads : {1, 3}) {
        set_num_threads(threads);
        topk(index.documents, queries, k, {}, got.data(), got_at.data());
        CHECK(got == want);
        CHECK(got_at == want_at);
      }
      std::vector<float> scores(want.size());
      scores_at(index.documents.forward, queries, want_at.data(), k, scores.data());
      CHECK(scores == want);
      // Pruned: other documents perhaps, never another score.
      topk(index.documents, queries, k, {3, 0.1, 0.9}, got.data(), got_at.data());
      scores_at(index.documents.forward, queries, got_at.data(), k, scores.data());
      CHECK(scores == got);
    }
  }
}

// Of many terms, of which one outweighs the others, not all show in a bound: a document without a
// sum is a candidate, unless the mask excludes it.
void test_many_terms_and_a_mask() {
  constexpr int64_t n = 300, terms = 200, heavy = 20, k = 10;
  Rows rows, query;
  for (int64_t i = 0; i < n; ++i) {
    if (i < heavy) rows.terms.push_back(0);
    rows.terms.push_back(static_cast<int32_t>(1 + i % (terms - 1)));
    rows.indptr.push_back(static_cast<int64_t>(rows.terms.size()));
  }
  rows.values.assign(rows.terms.size(), 1);
  for (int32_t term = 0; term < terms; ++term) query.terms.push_back(term);
  query.values.assign(terms, 20);
  query.values[0] = 1e6;
  query.indptr.push_back(terms);
  std::vector<uint8_t> mask(n, 1);
  std::fill_n(mask.begin(), heavy - 2, uint8_t{0});
  Documents documents;
  documents.forward = {rows.indptr.data(),
                       rows.terms.data(),
                       rows.values.data(),
                       DType::f32,
                       nullptr,
                       n,
                       static_cast<int64_t>(rows.terms.size())};
  const BuiltWindow window(documents.forward, 0, n);
  documents.windows = {window.view()};
  documents.mask = mask.data();
  std::vector<float> want(k), got(k);
  std::vector<int64_t> want_at(k), got_at(k);
  topk_reference(documents, view(query), k, want.data(), want_at.data());
  for (const Pruning& pruning : {Pruning{}, Pruning{0, 0, 0.5}}) {
    topk(documents, view(query), k, pruning, got.data(), got_at.data());
    CHECK(got == want);
    CHECK(got_at == want_at);
  }
}

// A smaller alpha finds no fewer of the best.
void test_alpha_rises() {
  const Index index(4000, 300, 40);
  Rows rows;
  for (int q = 0; q < 30; ++q) rows.add(300, 40, false, 1);
  const SparseQueries queries = view(rows);
  constexpr int64_t k = 10;
  const auto found = [&](const Pruning& pruning) {
    std::vector<float> scores(queries.count * k);
    std::vector<int64_t> at(scores.size());
    topk(index.documents, queries, k, pruning, scores.data(), at.data());
    return std::pair(scores, at);
  };
  const auto best = found({});
  int64_t before = 0;
  for (double alpha : {1.0, 0.9, 0.7, 0.4, 0.1}) {
    const auto pruned = found({4, 0, alpha});
    int64_t right = 0;
    for (size_t i = 0; i < best.first.size(); ++i) right += pruned.first[i] == best.first[i];
    CHECK(right >= before);
    before = right;
  }
  CHECK(before > 0);
}

// One query over several windows, which threads share by halves; thousands of candidates and hits.
void test_many_windows() {
  constexpr int64_t n = 3 * kWindow + 100;
  const Index index(n, 40, 12);
  Rows rows;
  rows.terms = {2, 5, 11, 12, 39};
  rows.values = {0.5f, 1, 1.5f, 2, 1};
  rows.indptr = {0, 5};
  const SparseQueries queries = view(rows);
  for (int64_t k : {1, 700, 5000}) {
    std::vector<float> want(k), got(k), pruned(k), scores(k);
    std::vector<int64_t> want_at(k), got_at(k), pruned_at(k);
    topk_reference(index.documents, queries, k, want.data(), want_at.data());
    for (int threads : {1, 2, 3}) {
      set_num_threads(threads);
      topk(index.documents, queries, k, {}, got.data(), got_at.data());
      CHECK(got == want);
      CHECK(got_at == want_at);
      // What a pruned search finds does not depend on threads either.
      topk(index.documents, queries, k, {2, 0, 0.9}, got.data(), got_at.data());
      if (threads == 1) pruned = got, pruned_at = got_at;
      CHECK(got == pruned);
      CHECK(got_at == pruned_at);
      scores_at(index.documents.forward, queries, got_at.data(), k, scores.data());
      CHECK(scores == got);
    }
  }
}

// The largest of each group, whatever the vector width.
void test_groups() {
  std::vector<uint16_t> sums(4096), most(512), want(512);
  for (uint16_t& sum : sums) sum = static_cast<uint16_t>(below(65536));
  for (int64_t d = 0; d < 4096; ++d) {
    uint16_t& group = want[d / 256 * 32 + d % 32];
    group = std::max(group, sums[d]);
  }
  search_kernels().group_most(sums.data(), 512, 8, most.data());
  CHECK(most == want);
}

void test_defects() {
  const Index index(300, 40, 12);
  const BuiltWindow good = index.built[0];
  CHECK(defect_of(good.view()) == nullptr);
  const auto bad = [&](auto&& change) {
    BuiltWindow window = good;
    change(window);
    CHECK(defect_of(window.view()) != nullptr);
    // Whatever stands there, a search stays within its memory.
    Documents documents = index.documents;
    documents.windows = {window.view()};
    Rows rows;
    for (int q = 0; q < 5; ++q) rows.add(40, 12, false, 1);
    std::vector<float> scores(5 * 7);
    std::vector<int64_t> at(scores.size());
    topk(documents, view(rows), 7, {}, scores.data(), at.data());
    CHECK(std::all_of(at.begin(), at.end(), [](int64_t i) { return i >= -1 && i < 300; }));
  };
  bad([](BuiltWindow& w) { w.terms[1] = w.terms[0]; });
  bad([](BuiltWindow& w) { w.terms[0] = -1; });
  bad([](BuiltWindow& w) { w.starts[1] = w.starts[2] + 4; });
  bad([](BuiltWindow& w) { w.starts[1] = -4; });
  bad([](BuiltWindow& w) { w.starts[1] += 1; });
  bad([](BuiltWindow& w) { w.starts.back() = int64_t{1} << 40; });
  bad([](BuiltWindow& w) { w.scales[0] = NAN; });
  bad([&](BuiltWindow& w) {
    for (int64_t t = 0; t < static_cast<int64_t>(w.terms.size()); ++t) {
      const Postings postings = postings_of(w.view(), t);
      if (postings.count) const_cast<uint16_t*>(postings.documents)[0] = 65535;
    }
  });
}

}  // namespace

int main() {
  for (const Isa level : isa_available()) {
    set_isa(level);
    test_search();
    test_many_terms_and_a_mask();
    test_alpha_rises();
    test_many_windows();
    test_groups();
    test_defects();
  }
  return report();
}
