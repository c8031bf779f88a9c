// SPDX-License-Identifier: Apache-2.0
// Every level against the reference, on random codes of odd sizes.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "hamming/hamming.h"
#include "hamming/hamming_reference.h"

using namespace pentad;
using namespace pentad::hamming;
using reference::Code;

namespace {

std::mt19937 random_bits(7);

struct Sample {
  int64_t dim, n;
  std::vector<std::vector<double>> vectors;
  std::vector<Code> codes;
  std::vector<uint8_t> flat;  // (n, bytes)
  std::vector<float> values;  // (n, dim)

  Sample(int64_t dim, int64_t n) : dim(dim), n(n) {
    flat.reserve(1), values.reserve(1);  // addresses even without rows
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> vector(dim);
      for (double& x : vector) values.push_back(static_cast<float>(x = normal(random_bits)));
      for (int64_t j = 0; j < dim; ++j) vector[j] = values[i * dim + j];
      codes.push_back(reference::pack(vector, 0));
      flat.insert(flat.end(), codes.back().begin(), codes.back().end());
      vectors.push_back(std::move(vector));
    }
  }
  int64_t bytes() const { return (dim + 7) / 8; }
  Matrix<const uint8_t> matrix() const { return {flat.data(), n, bytes(), bytes(), 1}; }
  Matrix<const float> floats() const { return {values.data(), n, dim, dim, 1}; }
};

double value_at(Metric metric, const void* values, int64_t i) {
  return metric == Metric::jaccard ? static_cast<const float*>(values)[i]
                                   : static_cast<const int32_t*>(values)[i];
}

void search(const Sample& q, const Sample& x, Metric metric) {
  std::vector<int32_t> all(q.n * x.n + 1), values;
  distance(q.matrix(), x.matrix(), metric, all.data());
  for (int64_t i = 0; i < q.n; ++i)
    for (int64_t j = 0; j < x.n; ++j)
      CHECK(value_at(metric, all.data(), i * x.n + j) ==
                reference::distance(q.codes[i], x.codes[j], metric),
            name(isa()), x.dim, i, j);

  // Row-major, and the same rows as blocks.
  const int64_t words = words_for(x.bytes()), blocks = (x.n + kBlockRows - 1) / kBlockRows;
  std::vector<uint16_t> packed(blocks * words * kBlockRows + 1), ones(x.n + 1);
  const int64_t part = x.n / 3;  // in two pieces, the second of which starts inside a block
  Matrix<const uint8_t> first = x.matrix(), second = x.matrix();
  first.rows = part;
  second.data = x.matrix().row(part);
  second.rows = x.n - part;
  to_blocks(first, packed.data(), ones.data(), 0, words);
  to_blocks(second, packed.data(), ones.data(), part, words);
  for (int64_t k : {int64_t{1}, int64_t{7}, x.n + 2}) {
    values.resize(q.n * k);
    std::vector<int64_t> ids(q.n * k);
    for (bool blocked : {false, true}) {
      Database database;
      database.codes = x.matrix();
      if (blocked) database.blocks = {packed.data(), ones.data(), x.n, words};
      topk(q.matrix(), database, metric, k, values.data(), ids.data());
      for (int64_t i = 0; i < q.n; ++i) {
        const auto best = reference::topk(q.codes[i], x.codes, k, metric);
        for (int64_t r = 0; r < k; ++r) {
          const bool exists = r < static_cast<int64_t>(best.size());
          CHECK(ids[i * k + r] == (exists ? best[r].second : -1), name(isa()), x.dim, x.n, k, r);
          if (exists)
            CHECK(value_at(metric, values.data(), i * k + r) == best[r].first, x.dim, x.n, k, r);
        }
      }
    }
  }
}

void floats(const Sample& q, const Sample& x) {
  std::vector<float> scores(q.n * x.n + 1), sums(q.n * x.dim + 1);
  score(q.floats(), x.matrix(), scores.data());
  for (int64_t i = 0; i < q.n; ++i)
    for (int64_t j = 0; j < x.n; ++j) {
      double magnitude = 0;
      for (double v : q.vectors[i]) magnitude += std::abs(v);
      const double bound = (x.dim / 4.0 + 3) * 6e-8 * magnitude;
      CHECK(std::abs(scores[i * x.n + j] - reference::score(q.vectors[i], x.codes[j])) <= bound,
            name(isa()), x.dim, i, j);
    }
  // Weights (q.n, x.n): the scores themselves.
  WeightedSum in{scores.data(), {0, x.n, 1}, x.flat.data(), {0, x.bytes(), 1}, 1, q.n, x.n, x.dim};
  weighted_sum(in, sums.data());
  for (int64_t i = 0; i < q.n; ++i) {
    const std::vector<double> weights(scores.begin() + i * x.n, scores.begin() + (i + 1) * x.n);
    const auto expected = reference::weighted_sum(weights, x.codes, x.dim);
    double magnitude = 1;
    for (double w : weights) magnitude += std::abs(w);
    for (int64_t j = 0; j < x.dim; ++j)
      CHECK(std::abs(sums[i * x.dim + j] - expected[j]) <= 1e-5 * magnitude, name(isa()), x.dim, j);
  }
}

void elementwise(const Sample& x) {
  std::vector<int64_t> offsets(x.n), byte_offsets(x.n);
  for (int64_t i = 0; i < x.n; ++i) offsets[i] = i * x.dim, byte_offsets[i] = i * x.bytes();
  std::vector<uint8_t> codes(x.n * x.bytes() + 1);
  CHECK(pack({x.values.data(), DType::f32, offsets.data(), x.n, x.dim, 1}, 0.0, codes.data()));
  CHECK(std::memcmp(codes.data(), x.flat.data(), x.flat.size()) == 0, name(isa()), x.dim);
  const Rows rows{x.flat.data(), DType::u8, byte_offsets.data(), x.n, x.bytes(), 1};
  std::vector<float> signs(x.n * x.dim + 1);
  unpack(rows, x.dim, DType::f32, signs.data());
  for (int64_t i = 0; i < x.n; ++i)
    for (int64_t j = 0; j < x.dim; ++j)
      CHECK(signs[i * x.dim + j] == (reference::bit(x.codes[i], j) ? 1 : -1), x.dim, i, j);
  for (int64_t shift : {int64_t{0}, int64_t{1}, int64_t{-3}, x.dim, 7 * x.dim + 5}) {
    permute(rows, x.dim, shift, codes.data());
    for (int64_t i = 0; i < x.n; ++i) {
      const Code expected = reference::permute(x.codes[i], x.dim, shift);
      CHECK(std::memcmp(codes.data() + i * x.bytes(), expected.data(), x.bytes()) == 0, x.dim,
            shift);
    }
  }
}

}  // namespace

int main() {
  for (Isa level : isa_available()) {
    set_isa(level);
    for (int threads : {1, 3}) {
      set_num_threads(threads);
      for (int64_t dim : {1, 7, 8, 17, 64, 65, 200, 1024}) {
        for (int64_t n : {0, 1, 33, 200}) {
          const Sample q(dim, 5 + n % 8), x(dim, n);
          for (Metric metric : {Metric::hamming, Metric::jaccard, Metric::intersection})
            search(q, x, metric);
          floats(q, x);
          elementwise(x);
        }
      }
    }
  }
  return report();
}
