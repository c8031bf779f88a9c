// SPDX-License-Identifier: Apache-2.0
// The kernels of the sparse family alone, per instruction-set level, each checked first: search
// and scores against their definitions, the SPLADE head against sums in double.
//
//   bench_sparse [--quick]
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "sparse/csr.h"
#include "sparse/postings.h"
#include "sparse/score.h"
#include "sparse/search.h"
#include "sparse/search_reference.h"
#include "sparse/splade.h"
#include "timing.h"

using namespace pentad;
using namespace pentad::sparse;

namespace {

constexpr int64_t kVocabulary = 30522;

std::mt19937_64 random_bits(1);

std::vector<float> normal(int64_t count, float scale = 1, float mean = 0) {
  std::normal_distribution<float> draw(mean, scale);
  std::vector<float> out(count);
  for (float& x : out) x = draw(random_bits);
  return out;
}

// --- Rows of different terms, drawn with probability proportional to 1 / (rank + 20) -------------

struct Drawn {
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
  std::vector<float> values;

  int64_t rows() const { return static_cast<int64_t>(indptr.size()) - 1; }
  Rows<float> all() const {
    return {rows(), static_cast<int64_t>(indices.size()), indptr.data(), indices.data(),
            values.data()};
  }
};

Drawn draw(int64_t rows, int64_t terms) {
  std::uniform_real_distribution<double> uniform;
  const double range = std::log((kVocabulary + 20) / 20.0);
  Drawn out;
  out.values.resize(rows * terms);
  std::normal_distribution<float> draw_value;
  for (float& x : out.values) x = std::min(0.58f * std::exp(0.6f * draw_value(random_bits)), 4.0f);
  out.indptr.push_back(0);
  std::vector<int32_t> row;
  for (int64_t i = 0; i < rows; ++i) {
    row.clear();
    while (static_cast<int64_t>(row.size()) < terms) {
      while (static_cast<int64_t>(row.size()) < terms) {
        const double rank = 20 * (std::exp(uniform(random_bits) * range) - 1);
        row.push_back(static_cast<int32_t>(std::min<double>(rank, kVocabulary - 1)));
      }
      std::sort(row.begin(), row.end());
      row.erase(std::unique(row.begin(), row.end()), row.end());
    }
    out.indices.insert(out.indices.end(), row.begin(), row.end());
    out.indptr.push_back(static_cast<int64_t>(out.indices.size()));
  }
  return out;
}

// Pairs of an entry of a query and a document that has its term.
int64_t postings(const Drawn& queries, const Drawn& docs) {
  std::vector<int64_t> lengths(kVocabulary);
  for (int32_t term : docs.indices) ++lengths[term];
  int64_t sum = 0;
  for (int32_t term : queries.indices) sum += lengths[term];
  return sum;
}

// --- Search --------------------------------------------------------------------------------------

struct OwnedWindow {
  std::vector<int32_t> terms;
  std::vector<int64_t> starts;
  std::vector<float> scales;
  std::vector<uint8_t> bytes;
};

bool search(bool quick) {
  const int64_t n = quick ? 20000 : 200000;
  const int rounds = quick ? 3 : 7;
  const Drawn docs = draw(n, 120), asked = draw(100, 40);
  Documents documents;
  documents.forward.indptr = docs.indptr.data();
  documents.forward.terms = docs.indices.data();
  documents.forward.values = docs.values.data();
  documents.forward.documents = n;
  documents.forward.entries = static_cast<int64_t>(docs.indices.size());
  std::deque<OwnedWindow> owned;
  int64_t bytes = 0;
  const double seconds = median_seconds(quick ? 1 : 3, [&] {
    owned.clear();
    documents.windows.clear();
    bytes = 0;
    for (int64_t first = 0; first < n; first += kWindow) {
      const int64_t last = std::min(first + kWindow, n);
      const WindowBuilder builder(documents.forward, first, last);
      OwnedWindow& own = owned.emplace_back();
      own.terms.resize(builder.count());
      own.starts.resize(builder.count() + 1);
      own.scales.resize(builder.count());
      own.bytes.resize(builder.bytes());
      builder.write(own.terms.data(), own.starts.data(), own.scales.data(), own.bytes.data());
      documents.windows.push_back({own.terms.data(), own.starts.data(), own.scales.data(),
                                   own.bytes.data(), builder.count(), builder.bytes(),
                                   last - first});
      bytes += builder.bytes();
    }
  });
  std::printf("%ld documents: lists built in %.2f s, %.2f bytes a posting\n\n",
              static_cast<long>(n), seconds,
              static_cast<double>(bytes) / static_cast<double>(documents.forward.entries));
  std::printf("level  queries     k   ms/query   postings/ns   (exact search)\n");
  for (const auto& [nq, k] : {std::pair<int64_t, int64_t>{1, 10}, {1, 1000}, {100, 10}}) {
    const SparseQueries queries{asked.indptr.data(), asked.indices.data(), asked.values.data(), nq};
    Drawn some = asked;
    some.indptr.resize(nq + 1);
    some.indices.resize(asked.indptr[nq]);
    const int64_t touched = postings(some, docs);
    const SparseQueries one{queries.indptr, queries.terms, queries.weights, 1};
    std::vector<float> expected(k), scores(nq * k);
    std::vector<int64_t> best(k), found(nq * k);
    topk_reference(documents, one, k, expected.data(), best.data());
    for (Isa level : isa_available()) {
      set_isa(level);
      const double taken = median_seconds(
          rounds, [&] { topk(documents, queries, k, {}, scores.data(), found.data()); });
      if (!std::equal(expected.begin(), expected.end(), scores.begin()) ||
          !std::equal(best.begin(), best.end(), found.begin())) {
        std::printf("%s: wrong documents\n", name(level));
        return false;
      }
      std::printf("%-5s %8ld %5ld %10.3f %13.2f\n", name(level), static_cast<long>(nq),
                  static_cast<long>(k), 1e3 * taken / nq, touched / taken / 1e9);
    }
  }
  return true;
}

// --- Scores --------------------------------------------------------------------------------------

// Those of the first query, and the gradient of its values, by dense rows in double.
bool scores_are_right(const Drawn& queries, const Drawn& docs, const std::vector<float>& scores,
                      const std::vector<float>& d_out, const std::vector<float>& d_queries) {
  const int64_t end = queries.indptr[1];
  std::vector<double> row(kVocabulary), gradient(kVocabulary);
  for (int64_t j = 0; j < end; ++j) row[queries.indices[j]] = queries.values[j];
  for (int64_t i = 0; i < docs.rows(); ++i) {
    double sum = 0;
    for (int64_t j = docs.indptr[i]; j < docs.indptr[i + 1]; ++j) {
      sum += row[docs.indices[j]] * docs.values[j];
      gradient[docs.indices[j]] += static_cast<double>(d_out[i]) * docs.values[j];
    }
    if (scores[i] != static_cast<float>(sum)) return false;
  }
  for (int64_t j = 0; j < end; ++j) {
    const double wanted = gradient[queries.indices[j]];
    // One rounding to float, of sums in double.
    if (std::abs(d_queries[j] - wanted) > 1e-6 * std::abs(wanted) + 1e-10) return false;
  }
  return true;
}

bool scores(bool quick) {
  const int64_t nq = quick ? 32 : 256, n = quick ? 512 : 4096;
  const int rounds = quick ? 3 : 7;
  const Drawn queries = draw(nq, 40), docs = draw(n, 120);
  const std::vector<float> d_out = normal(nq * n);
  std::vector<float> out(nq * n), d_queries(queries.values.size()), d_docs(docs.values.size());
  std::printf("\nlevel  forward ms   backward ms   (scores, %ld x %ld)\n", static_cast<long>(nq),
              static_cast<long>(n));
  for (Isa level : isa_available()) {
    set_isa(level);
    const double forward =
        median_seconds(rounds, [&] { score(queries.all(), docs.all(), out.data()); });
    const double backward = median_seconds(rounds, [&] {
      score_backward(queries.all(), docs.all(), d_out.data(), d_queries.data(), d_docs.data());
    });
    if (!scores_are_right(queries, docs, out, d_out, d_queries)) {
      std::printf("%s: wrong scores\n", name(level));
      return false;
    }
    std::printf("%-5s %11.2f %13.2f\n", name(level), 1e3 * forward, 1e3 * backward);
  }
  return true;
}

// --- The SPLADE head -----------------------------------------------------------------------------

TensorView view(std::vector<float>& data, std::initializer_list<int64_t> shape) {
  TensorView out;
  out.data = data.data();
  out.dtype = DType::f32;
  out.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), out.shape);
  int64_t stride = 1;
  for (int i = out.rank; i-- > 0; stride *= out.shape[i]) out.strides[i] = stride;
  return out;
}

bool close(double actual, double expected) {
  return std::abs(actual - expected) <= 1e-4 + 1e-4 * std::abs(expected);
}

bool splade(bool quick) {
  const int64_t B = quick ? 2 : 16, L = quick ? 16 : 128, V = quick ? 3000 : kVocabulary;
  const int rounds = quick ? 3 : 5;
  std::printf(
      "\nlevel     H  forward ms   GF/s  backward ms   (splade_head, B %ld, L %ld, V %ld)\n",
      static_cast<long>(B), static_cast<long>(L), static_cast<long>(V));
  for (int64_t H : {128, 768}) {
    // One of some fifty results is above zero.
    std::vector<float> hidden = normal(B * L * H);
    std::vector<float> weight = normal(V * H, 1 / std::sqrt(static_cast<float>(H)));
    std::vector<float> bias = normal(V, 0.1f, -3.5f), d_out = normal(B * V);
    SpladeHead head;
    head.hidden = view(hidden, {B, L, H});
    head.weight = view(weight, {V, H});
    head.bias = view(bias, {V});
    // The definition of a part of it: the first sequence, the first terms.
    SpladeHead part = head;
    const int64_t some = std::min<int64_t>(V, 500);
    part.hidden.shape[0] = 1;
    part.weight.shape[0] = part.bias->shape[0] = some;
    std::vector<float> expected(some);
    reference_splade_head(part, {expected.data(), nullptr, nullptr});

    std::vector<float> out(B * V), top(B * V), d_hidden(B * L * H), d_weight(V * H), d_bias(V);
    std::vector<int32_t> place(B * V);
    for (Isa level : isa_available()) {
      set_isa(level);
      const double forward = median_seconds(
          rounds, [&] { splade_head(head, {out.data(), top.data(), place.data()}); });
      const double backward = median_seconds(rounds, [&] {
        splade_head_backward(head, {view(d_out, {B, V}), top.data(), place.data(), d_hidden.data(),
                                    d_weight.data(), d_bias.data()});
      });
      bool right = true;
      for (int64_t v = 0; v < some; ++v) right &= close(out[v], expected[v]);
      for (int64_t v = 0; v < V; ++v) {
        double wanted = 0;
        for (int64_t b = 0; b < B; ++b)
          if (place[b * V + v] >= 0) wanted += d_out[b * V + v] / (1.0 + top[b * V + v]);
        right &= close(d_bias[v], wanted);
      }
      if (!right) {
        std::printf("%s: wrong weights\n", name(level));
        return false;
      }
      std::printf("%-5s %5ld %11.2f %6.1f %12.2f\n", name(level), static_cast<long>(H),
                  1e3 * forward, 2e-9 * B * L * V * H / forward, 1e3 * backward);
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
  std::printf("%d threads, %s\n\n", num_threads(), thread_runtime());
  return search(quick) && scores(quick) && splade(quick) ? 0 : 1;
}
