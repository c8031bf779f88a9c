// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, executed on the CPU lane by lane, against the reference: odd sizes, strides,
// tensor cores and popcounts, each order of the lanes.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "hamming/hamming_cuda.h"
#include "hamming/hamming_reference.h"
#include "orders.h"

using namespace pentad;
using namespace pentad::hamming;
using cuda::Product;
using reference::Code;

namespace {

std::mt19937 random_bits(7);
const CudaStream stream;
constexpr Metric kMetrics[] = {Metric::hamming, Metric::jaccard, Metric::intersection};

// Random codes in memory with the given strides; few distinct ones, so that there are ties.
struct Sample {
  int64_t dim, n;
  std::vector<Code> codes;
  std::vector<uint8_t> memory;
  Matrix<const uint8_t> matrix;

  Sample(int64_t dim, int64_t n, int64_t col_stride = 1, int64_t gap = 0) : dim(dim), n(n) {
    const int64_t bytes = (dim + 7) / 8, row_stride = bytes * col_stride + gap;
    memory.resize(n * row_stride + 1);
    std::vector<Code> few;
    for (int i = 0; i < 40; ++i) {
      std::vector<double> x(dim);
      for (double& value : x) value = random_bits() % 3 ? -1 : 1;
      few.push_back(reference::pack(x, 0));
    }
    for (int64_t i = 0; i < n; ++i) {
      codes.push_back(few[random_bits() % few.size()]);
      for (int64_t j = 0; j < bytes; ++j) memory[i * row_stride + j * col_stride] = codes.back()[j];
    }
    matrix = {memory.data(), n, bytes, row_stride, col_stride};
  }
};

// Memory of exactly this size, so that the sanitizer sees what goes past it.
template <class T>
std::vector<T> room(int64_t count) {
  std::vector<T> memory(count);
  memory.reserve(1);
  return memory;
}

double value_at(Metric metric, const std::vector<int32_t>& values, int64_t i) {
  if (metric != Metric::jaccard) return values[i];
  float value;
  std::memcpy(&value, &values[i], 4);
  return value;
}

void all_pairs(const Sample& a, const Sample& b) {
  for (Metric metric : kMetrics)
    for (Product product : {Product::tensor, Product::popcount}) {
      auto out = room<int32_t>(a.n * b.n);
      auto scratch = room<uint8_t>(cuda::distance_scratch(a.n, b.n));
      cuda::distance(stream, a.matrix, b.matrix, metric, out.data(), scratch.data(), product);
      for (int64_t i = 0; i < a.n; ++i)
        for (int64_t j = 0; j < b.n; ++j)
          CHECK(value_at(metric, out, i * b.n + j) ==
                    reference::distance(a.codes[i], b.codes[j], metric),
                a.dim, i, j);
    }
}

void search(const Sample& q, const Sample& x, const std::vector<int64_t>& ks, bool masked = false) {
  std::vector<uint8_t> mask(x.n + 1);
  for (int64_t i = 0; i < x.n; ++i) mask[i] = random_bits() % 2;
  for (Metric metric : kMetrics) {
    const double none = metric == Metric::hamming   ? 2147483647.0
                        : metric == Metric::jaccard ? INFINITY
                                                    : -1.0;
    std::vector<std::vector<std::pair<double, int64_t>>> best;
    for (const Code& code : q.codes) {
      best.push_back(reference::topk(code, x.codes, x.n, metric));
      if (masked) std::erase_if(best.back(), [&](const auto& hit) { return !mask[hit.second]; });
    }
    for (int64_t k : ks) {
      auto values = room<int32_t>(q.n * k);
      auto ids = room<int64_t>(q.n * k);
      auto scratch = room<uint64_t>((cuda::topk_scratch(q.n, x.n, k) + 7) / 8);
      const Product product = k % 2 ? Product::tensor : Product::popcount;
      cuda::topk(stream, q.matrix, x.matrix, masked ? mask.data() : nullptr, metric, k,
                 values.data(), ids.data(), scratch.data(), product);
      for (int64_t i = 0; i < q.n; ++i)
        for (int64_t r = 0; r < k; ++r) {
          const bool exists = r < static_cast<int64_t>(best[i].size());
          CHECK(ids[i * k + r] == (exists ? best[i][r].second : -1), x.dim, x.n, q.n, k, r);
          CHECK(value_at(metric, values, i * k + r) == (exists ? best[i][r].first : none), x.dim,
                x.n, q.n, k, r);
        }
    }
  }
}

// Scores have the bits of the CPU's kernel; sums lie within the reference's error.
void floats(int64_t nq, const Sample& x) {
  std::normal_distribution<float> normal;
  std::vector<float> queries(nq * x.dim * 2);
  for (float& value : queries) value = normal(random_bits);
  for (int64_t stride : {1, 2}) {
    const Matrix<const float> rows{queries.data(), nq, x.dim, x.dim * stride, stride};
    auto scores = room<float>(nq * x.n), expected = room<float>(nq * x.n);
    cuda::score(stream, rows, x.matrix, scores.data());
    score(rows, x.matrix, expected.data());
    for (int64_t i = 0; i < nq * x.n; ++i) CHECK(scores[i] == expected[i], x.dim, x.n, i);
  }

  auto weights = room<float>(nq * x.n), sums = room<float>(nq * x.dim);
  for (float& w : weights) w = normal(random_bits);
  const WeightedSum in{weights.data(),
                       {nq * x.n, x.n, 1},
                       x.matrix.data,
                       {0, x.matrix.row_stride, x.matrix.col_stride},
                       1,
                       nq,
                       x.n,
                       x.dim};
  auto scratch = room<uint8_t>(cuda::weighted_sum_scratch(1, nq, x.n, x.dim));
  cuda::weighted_sum(stream, in, sums.data(), scratch.data());
  for (int64_t i = 0; i < nq; ++i) {
    const std::vector<double> w(weights.begin() + i * x.n, weights.begin() + (i + 1) * x.n);
    const auto expected = reference::weighted_sum(w, x.codes, x.dim);
    double magnitude = 1;
    for (double value : w) magnitude += std::abs(value);
    for (int64_t j = 0; j < x.dim; ++j)
      CHECK(std::abs(sums[i * x.dim + j] - expected[j]) <= 1e-5 * magnitude, x.dim, j);
  }
}

// Two entries of a batch, from views of larger arrays.
void batches() {
  const Sample x(19, 30);
  std::vector<float> weights(2 * 3 * 15);
  for (float& w : weights) w = static_cast<float>(random_bits() % 7) - 3;
  const WeightedSum in{weights.data(), {45, 1, 3}, x.matrix.data, {15 * 3, 3, 1}, 2, 3, 15, 19};
  auto sums = room<float>(2 * 3 * 19);
  cuda::weighted_sum(stream, in, sums.data(), nullptr);
  for (int b = 0; b < 2; ++b)
    for (int q = 0; q < 3; ++q) {
      std::vector<double> w;
      for (int i = 0; i < 15; ++i) w.push_back(weights[b * 45 + q + i * 3]);
      const std::vector<Code> codes(x.codes.begin() + b * 15, x.codes.begin() + b * 15 + 15);
      const auto expected = reference::weighted_sum(w, codes, 19);
      for (int j = 0; j < 19; ++j) CHECK(sums[(b * 3 + q) * 19 + j] == expected[j], b, q, j);
    }
}

}  // namespace

int main() {
  in_every_order([] {
    for (int64_t dim : {1, 17, 128, 200, 2048}) {
      for (int64_t n : {0, 1, 70}) {
        const Sample few(dim, 3), many(dim, 37), x(dim, n);
        all_pairs(many, x);
        search(few, x, {1, n + 2});
        search(many, x, {1, n + 2});
        floats(3, x);
      }
    }
    // Strides that forbid whole pieces, and rows that allow them with a gap between.
    const Sample strided(130, 40, 2, 3), gapped(256, 40, 1, 16), misplaced(256, 40, 1, 5);
    for (const Sample* x : {&strided, &gapped, &misplaced}) {
      all_pairs(*x, *x);
      search(*x, *x, {5}, true);
      floats(2, *x);
    }
    batches();
    // Several slices and merges; lists that fill up and shrink; slices of sums.
    const Sample one(64, 1), nine(64, 9), x(64, 2600);
    search(one, x, {10}, true);
    search(nine, x, {3, 300});
    search(one, x, {2048});
    floats(1, Sample(40, 2500));
  });
  return report();
}
