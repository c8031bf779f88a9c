// SPDX-License-Identifier: Apache-2.0
// Rows in any order against a map per row; scores and gradients against plain loops.
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "common/parallel.h"
#include "common/reals.h"
#include "sparse/csr.h"
#include "sparse/score.h"

using namespace pentad;
using namespace pentad::sparse;

namespace {

std::mt19937 generator(1);

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }

// Rows of up to `most` entries in no order, duplicates among them, as memory of the dtypes.
struct Given {
  std::vector<int64_t> indptr = {0}, wide;
  std::vector<int32_t> narrow;
  std::vector<char> values;
  GivenRows rows;

  Given(int64_t n, int64_t columns, int64_t most, DType index_dtype, DType dtype) {
    std::normal_distribution<double> normal;
    // Few different terms, the first and the last among them, so that rows share some.
    std::vector<int64_t> terms = {0, columns - 1};
    for (std::mt19937_64 of(columns); static_cast<int64_t>(terms.size()) < 4 * most;)
      terms.push_back(static_cast<int64_t>(of() % static_cast<uint64_t>(columns)));
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t i = below(most + 1); i > 0; --i) wide.push_back(terms[below(terms.size())]);
      indptr.push_back(static_cast<int64_t>(wide.size()));
    }
    narrow.assign(wide.begin(), wide.end());
    values.resize(wide.size() * size_of(dtype));
    for (size_t i = 0; i < wide.size(); ++i) write_real(values.data(), dtype, i, normal(generator));
    const void* indices = wide.data();
    if (index_dtype == DType::i32) indices = narrow.data();
    rows = {"op",          "x",     n,           static_cast<int64_t>(wide.size()),
            indptr.data(), indices, index_dtype, values.data(),
            dtype,         columns};
  }
  double value(int64_t i) const { return read_real(values.data(), rows.dtype, i); }
};

template <class T>
void check_rows(const Given& given, const CanonicalRows& canonical) {
  const Rows<T> rows = canonical.rows<T>();
  std::vector<T> positions, back(given.wide.size());
  for (int64_t i = 0; i < rows.nnz; ++i) positions.push_back(static_cast<T>(i));
  canonical.to_caller(positions.data(), back.data());
  int64_t at = 0;
  for (int64_t row = 0; row < rows.rows; ++row) {
    std::map<int64_t, double> sums;
    for (int64_t i = given.indptr[row]; i < given.indptr[row + 1]; ++i)
      sums[given.wide[i]] += given.value(i);
    CHECK(rows.indptr[row] == at, row);
    for (const auto& [term, sum] : sums) {
      const double rounded = given.rows.dtype == DType::f64 ? sum : static_cast<float>(sum);
      CHECK(rows.indices[at] == term && rows.values[at] == static_cast<T>(rounded), row, term);
      ++at;
    }
    for (int64_t i = given.indptr[row]; i < given.indptr[row + 1]; ++i)
      CHECK(rows.indices[static_cast<int64_t>(back[i])] == given.wide[i], row, i);
  }
  CHECK(rows.indptr[rows.rows] == at && rows.nnz == at);
}

// visit(b, d, i, j) for the common terms of all, or of the pairs, rising.
template <class T, class Visit>
void for_all(const Rows<T>& q, const Rows<T>& d, const std::vector<int64_t>& query,
             const std::vector<int64_t>& doc, const Visit& visit) {
  for (size_t p = 0; p < query.size(); ++p)
    for (int64_t i = q.indptr[query[p]]; i < q.indptr[query[p] + 1]; ++i)
      for (int64_t j = d.indptr[doc[p]]; j < d.indptr[doc[p] + 1]; ++j)
        if (q.indices[i] == d.indices[j]) visit(p, i, j);
}

// At most an ulp of T and what double sums in another order differ by.
template <class T>
bool close(T a, double b, double magnitude) {
  const double ulp = std::numeric_limits<T>::epsilon();
  return std::abs(static_cast<double>(a) - b) <= ulp * std::abs(b) + 1e-14 * magnitude;
}

template <class T>
void check_scores(const Rows<T>& q, const Rows<T>& d) {
  std::normal_distribution<double> normal;
  for (const bool paired : {false, true}) {
    if (paired && (!q.rows || !d.rows)) continue;
    std::vector<int64_t> query, doc;
    for (int64_t p = 0; p < (paired ? 600 : q.rows * d.rows); ++p) {
      query.push_back(paired ? below(q.rows) : p / d.rows);
      doc.push_back(paired ? below(d.rows) : p % d.rows);
    }
    const Pairs pairs = {static_cast<int64_t>(query.size()), query.data(), doc.data()};
    std::vector<double> want(query.size(), 0.0), dq(q.nnz, 0.0), dd(d.nnz, 0.0), mq = dq, md = dd;
    std::vector<T> got(query.size(), T{7}), g(query.size());
    for (T& x : g) x = static_cast<T>(normal(generator));
    for_all(q, d, query, doc, [&](size_t p, int64_t i, int64_t j) {
      const double x = q.values[i], y = d.values[j];
      want[p] += x * y;
      dq[i] += g[p] * y, mq[i] += std::abs(g[p] * y);
      dd[j] += g[p] * x, md[j] += std::abs(g[p] * x);
    });
    std::vector<std::vector<T>> first;
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      if (paired) score_pairs(q, d, pairs, got.data());
      else score(q, d, got.data());
      for (size_t p = 0; p < got.size(); ++p) CHECK(got[p] == static_cast<T>(want[p]), paired, p);
      for (const int wanted : {3, 1, 2}) {
        std::vector<T> a(q.nnz, T{7}), b(d.nnz, T{7});
        T *to_a = wanted & 1 ? a.data() : nullptr, *to_b = wanted & 2 ? b.data() : nullptr;
        if (paired) score_pairs_backward(q, d, pairs, g.data(), to_a, to_b);
        else score_backward(q, d, g.data(), to_a, to_b);
        for (int64_t i = 0; to_a && i < q.nnz; ++i) CHECK(close(a[i], dq[i], mq[i]), paired, i);
        for (int64_t i = 0; to_b && i < d.nnz; ++i) CHECK(close(b[i], dd[i], md[i]), paired, i);
        if (threads == 1 && wanted == 3) first = {a, b};
        CHECK((!to_a || a == first[0]) && (!to_b || b == first[1]), threads, wanted);
      }
    }
  }
}

template <class T>
void check_case(int64_t nq, int64_t n, int64_t columns, int64_t of_query, int64_t of_doc,
                DType index_dtype, DType dtype) {
  const DType wide = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const Given q(nq, columns, of_query, index_dtype, dtype);
  const Given d(n, columns, of_doc, index_dtype, dtype);
  const CanonicalRows queries(q.rows, wide), docs(d.rows, wide);
  check_rows<T>(q, queries);
  check_rows<T>(d, docs);
  check_scores(queries.rows<T>(), docs.rows<T>());
}

void check_refused() {
  const auto refuses = [](const auto& change, const std::string& part) {
    Given given(9, 50, 12, DType::i64, DType::f32);
    change(given);
    std::string message;
    try {
      check(given.rows);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK(message.find(part) != std::string::npos, message, part);
  };
  refuses([](Given& g) { g.indptr[0] = 1; }, "begins with 1");
  refuses([](Given& g) { g.indptr[4] = g.rows.nnz + 1; }, "descends");
  refuses([](Given& g) { --g.rows.nnz; }, "ends with");
  refuses([](Given& g) { g.wide[3] = 50; }, "an index 50 past its 50 columns");
  refuses([](Given& g) { g.wide[3] = -1; }, "the index -1");
  refuses([](Given& g) { write_real(g.values.data(), DType::f32, 3, NAN); }, "the value NaN");
}

}  // namespace

int main() {
  for (const DType index_dtype : {DType::i32, DType::i64})
    for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
      check_case<float>(3, 5, 1, 2, 2, index_dtype, dtype == DType::f64 ? DType::f32 : dtype);
      check_case<double>(7, 40, 60, 9, 20, index_dtype, dtype);
    }
  constexpr int64_t kMost = kMostColumns;
  struct Shape {
    int64_t nq, n, columns, of_query, of_doc;
  };
  for (const Shape& s : {Shape{0, 5, 9, 3, 3},
                         {5, 0, 9, 3, 3},
                         {1, 70, 300, 30, 40},
                         {70, 1, 300, 30, 40},
                         {33, 47, kMost, 12, 20},
                         {47, 33, kMost, 12, 20},
                         {2, 3, 9000, 4, 2500},
                         {40, 300, 500, 10, 30},
                         {1100, 9, 90, 5, 5},
                         {1100, 1200, 90, 2, 2},
                         {1200, 1100, kMost, 2, 2}}) {
    check_case<float>(s.nq, s.n, s.columns, s.of_query, s.of_doc, DType::i64, DType::f32);
    check_case<double>(s.nq, s.n, s.columns, s.of_query, s.of_doc, DType::i32, DType::f64);
  }
  // Several pieces of entries.
  const Given large(3000, 700, 80, DType::i64, DType::f16);
  check_rows<float>(large, CanonicalRows(large.rows, DType::f32));
  check_refused();
  return report();
}
