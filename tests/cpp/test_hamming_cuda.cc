// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, executed on the CPU lane by lane, against the reference: odd sizes, strides,
// tensor cores and popcounts, each order of the lanes.
#include <algorithm>
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

// Lists of uneven sizes, one of them empty, of which each query visits some.
void visits(const Sample& q, const Sample& x, int64_t count, const std::vector<int64_t>& ks) {
  const int64_t lists = 5;
  std::vector<int64_t> borders{0, x.n / 7, x.n / 7, x.n / 2, x.n - x.n / 9, x.n};
  std::vector<int64_t> ids_of(x.n), rows(x.n);
  for (int64_t i = 0; i < x.n; ++i) ids_of[i] = i;
  std::shuffle(ids_of.begin(), ids_of.end(), random_bits);
  for (int64_t i = 0; i < x.n; ++i) rows[ids_of[i]] = i;
  std::vector<uint8_t> mask(x.n + 1);
  for (int64_t i = 0; i < x.n; ++i) mask[i] = random_bits() % 2;
  std::vector<int64_t> probes;
  for (int64_t i = 0; i < q.n; ++i) {
    std::vector<int64_t> order{0, 1, 2, 3, 4, -1};  // -1: none
    std::shuffle(order.begin(), order.end(), random_bits);
    probes.insert(probes.end(), order.begin(), order.begin() + count);
  }
  for (Metric metric : kMetrics)
    for (int64_t k : ks)
      for (bool masked : {false, true}) {
        auto values = room<int32_t>(q.n * k);
        auto ids = room<int64_t>(q.n * k);
        auto scratch =
            room<uint64_t>((cuda::topk_lists_scratch(q.n, count, x.n, lists, k) + 7) / 8);
        cuda::topk_lists(stream, q.matrix, x.matrix,
                         {probes.data(), count, lists, borders.data(), ids_of.data()},
                         masked ? mask.data() : nullptr, metric, k, values.data(), ids.data(),
                         scratch.data());
        for (int64_t i = 0; i < q.n; ++i) {
          std::vector<std::pair<double, int64_t>> best;
          for (int64_t p = 0; p < count; ++p) {
            const int64_t list = probes[i * count + p];
            for (int64_t r = list < 0 ? 0 : borders[list]; list >= 0 && r < borders[list + 1]; ++r)
              if (!masked || mask[ids_of[r]]) {
                const double d = reference::distance(q.codes[i], x.codes[r], metric);
                best.emplace_back(metric == Metric::intersection ? -d : d, ids_of[r]);
              }
          }
          std::sort(best.begin(), best.end());
          for (int64_t r = 0; r < k; ++r) {
            const bool exists = r < static_cast<int64_t>(best.size());
            CHECK(ids[i * k + r] == (exists ? best[r].second : -1), x.dim, x.n, count, i, k, r);
            if (exists)
              CHECK(std::abs(value_at(metric, values, i * k + r)) == std::abs(best[r].first));
          }
        }
      }
}

void ranges(const Sample& q, const Sample& x) {
  std::vector<uint8_t> mask(x.n + 1);
  for (int64_t i = 0; i < x.n; ++i) mask[i] = random_bits() % 2;
  for (Metric metric : kMetrics)
    for (bool masked : {false, true}) {
      // The middle of what there is, nothing, everything.
      const double middle = x.n ? reference::distance(q.codes[0], x.codes[x.n / 2], metric) : 0;
      for (double radius : {middle, -1.0, 1e9}) {
        const Product product = masked ? Product::tensor : Product::popcount;
        const uint32_t limit = radius_limit(metric, radius);
        const auto* live = masked ? mask.data() : nullptr;
        auto indptr = room<int64_t>(q.n + 1);
        auto scratch = room<uint64_t>((cuda::range_scratch(q.n, x.n) + 7) / 8);
        cuda::range_count(stream, q.matrix, x.matrix, live, metric, limit, indptr.data(),
                          scratch.data(), product);
        const int64_t total = indptr[q.n];
        auto values = room<int32_t>(total);
        auto ids = room<int64_t>(total);
        cuda::range_write(stream, q.matrix, x.matrix, live, metric, limit, total, values.data(),
                          ids.data(), scratch.data(), product);
        int64_t at = 0;
        for (int64_t i = 0; i < q.n; ++i) {
          CHECK(indptr[i] == at, x.dim, x.n, q.n, i);
          for (int64_t j = 0; j < x.n; ++j) {
            const double d = reference::distance(q.codes[i], x.codes[j], metric);
            const bool inside = metric == Metric::intersection ? d >= radius : d <= radius;
            if (!inside || (masked && !mask[j])) continue;
            CHECK(at < total && ids[at] == j && value_at(metric, values, at) == d, x.dim, i, j);
            ++at;
          }
        }
        CHECK(at == total, x.dim, x.n, q.n);
      }
    }
}

// The k largest scores, and those of candidates; with the bits of the CPU's score.
void scores(int64_t nq, const Sample& x, const std::vector<int64_t>& ks) {
  std::vector<float> memory(nq * x.dim);
  for (float& value : memory) value = static_cast<float>(random_bits() % 9) - 4;  // ties
  const Matrix<const float> queries{memory.data(), nq, x.dim, x.dim, 1};
  std::vector<float> all(nq * x.n);
  score(queries, x.matrix, all.data());
  std::vector<uint8_t> mask(x.n + 1);
  for (int64_t i = 0; i < x.n; ++i) mask[i] = random_bits() % 4 != 0;
  for (int64_t k : ks)
    for (bool masked : {false, true}) {
      auto values = room<float>(nq * k);
      auto ids = room<int64_t>(nq * k);
      auto scratch = room<uint64_t>((cuda::topk_score_scratch(nq, x.n, k) + 7) / 8);
      cuda::topk_score(stream, queries, x.matrix, masked ? mask.data() : nullptr, k, values.data(),
                       ids.data(), scratch.data());
      for (int64_t q = 0; q < nq; ++q) {
        std::vector<int64_t> order;
        for (int64_t i = 0; i < x.n; ++i)
          if (!masked || mask[i]) order.push_back(i);
        const float* row = all.data() + q * x.n;
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return row[a] > row[b]; });
        for (int64_t r = 0; r < k; ++r) {
          const bool exists = r < static_cast<int64_t>(order.size());
          CHECK(ids[q * k + r] == (exists ? order[r] : -1), x.dim, x.n, q, k, r);
          CHECK(values[q * k + r] == (exists ? row[order[r]] : -INFINITY), x.dim, x.n, q, k, r);
        }
      }
    }

  const int64_t c = 300;
  auto candidates = room<int64_t>(nq * c);
  for (int64_t& row : candidates) row = static_cast<int64_t>(random_bits() % (x.n + 2)) - 1;
  auto found = room<float>(nq * c), dots = room<float>(nq * c), scale = room<float>(x.n);
  auto vectors = room<int8_t>(x.n * x.dim);
  auto halves = room<uint16_t>(x.n * x.dim);  // of the same numbers
  for (int64_t i = 0; i < x.n * x.dim; ++i) {
    vectors[i] = static_cast<int8_t>(random_bits() % 5) - 2;
    const uint16_t kHalves[] = {0xc000, 0xbc00, 0, 0x3c00, 0x4000};
    halves[i] = kHalves[vectors[i] + 2];
  }
  for (float& value : scale) value = static_cast<float>(random_bits() % 4);
  cuda::score_candidates(stream, queries, x.matrix, candidates.data(), c, found.data());
  for (DType dtype : {DType::i8, DType::f16}) {
    const bool scaled = dtype == DType::i8;
    const void* stored = scaled ? static_cast<const void*>(vectors.data()) : halves.data();
    cuda::dot_candidates(stream, queries, stored, dtype, scaled ? scale.data() : nullptr, x.n,
                         candidates.data(), c, dots.data());
    for (int64_t i = 0; i < nq * c; ++i) {
      const int64_t row = candidates[i], q = i / c;
      const bool exists = row >= 0 && row < x.n;
      CHECK(found[i] == (exists ? all[q * x.n + row] : -INFINITY), x.dim, x.n, i);
      double dot = 0;
      for (int64_t j = 0; exists && j < x.dim; ++j)
        dot += memory[q * x.dim + j] * vectors[row * x.dim + j];
      CHECK(dots[i] == (exists ? dot * (scaled ? scale[row] : 1) : -INFINITY), x.dim, x.n, i);
    }
  }
}

// Numbers of every type to bits and back; `gap` elements between two.
void codes_of_numbers(int64_t dim, int64_t gap) {
  const int64_t shape[] = {2, 3, dim}, bytes = (dim + 7) / 8, rows = 6;
  const auto view_of = [&](void* data, DType dtype, int64_t last) {
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.rank = 3;
    const int64_t stride = 1 + gap;
    for (int d = 0; d < 3; ++d) view.shape[d] = d == 2 ? last : shape[d];
    view.strides[2] = stride;
    view.strides[1] = 2 * last * stride;  // the rows of the other first index lie between
    view.strides[0] = last * stride;
    return view;
  };
  const auto place = [&](int64_t row, int64_t j, int64_t last) {
    return (row % 3 * 2 + row / 3) * last * (1 + gap) + j * (1 + gap);
  };
  std::vector<std::vector<double>> numbers(rows, std::vector<double>(dim));
  for (auto& row : numbers)
    for (double& x : row) x = static_cast<int>(random_bits() % 5) - 2;
  for (DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16, DType::i8}) {
    const uint16_t kHalf[] = {0xc000, 0xbc00, 0, 0x3c00, 0x4000};
    const uint16_t kBrain[] = {0xc000, 0xbf80, 0, 0x3f80, 0x4000};
    auto memory = room<uint64_t>(rows * dim * (1 + gap));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < dim; ++j) {
        const double x = numbers[row][j];
        const int64_t at = place(row, j, dim);
        if (dtype == DType::f32) reinterpret_cast<float*>(memory.data())[at] = x;
        if (dtype == DType::f64) reinterpret_cast<double*>(memory.data())[at] = x;
        if (dtype == DType::i8) reinterpret_cast<int8_t*>(memory.data())[at] = x;
        if (size_of(dtype) == 2)
          reinterpret_cast<uint16_t*>(memory.data())[at] =
              (dtype == DType::f16 ? kHalf : kBrain)[static_cast<int>(x) + 2];
      }
    for (double threshold : {0.0, 1.0}) {
      auto codes = room<uint8_t>(rows * bytes);
      int32_t nan = 0;
      cuda::pack(stream, view_of(memory.data(), dtype, dim), threshold, codes.data(), &nan);
      CHECK(nan == 0);
      for (int64_t row = 0; row < rows; ++row) {
        const Code expected = reference::pack(numbers[row], threshold);
        for (int64_t b = 0; b < bytes; ++b) CHECK(codes[row * bytes + b] == expected[b], dim, row);
      }
      if (dtype != DType::f32) continue;
      // The codes lie as the numbers did, with gaps.
      auto spread = room<uint8_t>(rows * bytes * (1 + gap));
      for (int64_t i = 0; i < rows * bytes; ++i)
        spread[place(i / bytes, i % bytes, bytes)] = codes[i];
      const TensorView view = view_of(spread.data(), DType::u8, bytes);
      for (int64_t shift : {int64_t{0}, int64_t{1}, dim / 2, dim + 11, int64_t{-3}}) {
        auto turned = room<uint8_t>(rows * bytes);
        cuda::permute(stream, view, dim, shift, turned.data());
        for (int64_t row = 0; row < rows; ++row) {
          const Code code(codes.begin() + row * bytes, codes.begin() + (row + 1) * bytes);
          const Code expected = reference::permute(code, dim, shift);
          for (int64_t b = 0; b < bytes; ++b)
            CHECK(turned[row * bytes + b] == expected[b], dim, shift, row, b);
        }
      }
      for (DType back : {DType::f32, DType::f64, DType::f16, DType::bf16, DType::i8}) {
        auto out = room<uint8_t>(rows * dim * size_of(back));
        cuda::unpack(stream, view, dim, back, out.data());
        for (int64_t i = 0; i < rows * dim; ++i) {
          const bool one = codes[i / dim * bytes + i % dim / 8] >> (7 - i % dim % 8) & 1;
          uint64_t got = 0;
          std::memcpy(&got, out.data() + i * size_of(back), size_of(back));
          const uint64_t sign = uint64_t{1} << (size_of(back) * 8 - 1);
          const uint64_t plus = back == DType::f32    ? 0x3f800000
                                : back == DType::f64  ? 0x3ff0000000000000
                                : back == DType::f16  ? 0x3c00
                                : back == DType::bf16 ? 0x3f80
                                                      : 1;
          const uint64_t minus = back == DType::i8 ? 0xff : plus | sign;
          CHECK(got == (one ? plus : minus), dim, i);
        }
      }
    }
  }
  auto memory = room<float>(dim);
  memory[dim - 1] = NAN;
  TensorView row;
  row.data = memory.data(), row.dtype = DType::f32, row.rank = 1;
  row.shape[0] = dim, row.strides[0] = 1;
  auto codes = room<uint8_t>(bytes);
  int32_t nan = 0;
  cuda::pack(stream, row, 0, codes.data(), nullptr);
  cuda::pack(stream, row, 0, codes.data(), &nan);
  CHECK(nan == 1);
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
        ranges(many, x);
        floats(3, x);
        scores(3, x, {1, n + 2});
      }
    }
    // Strides that forbid whole pieces, and rows that allow them with a gap between.
    const Sample strided(130, 40, 2, 3), gapped(256, 40, 1, 16), misplaced(256, 40, 1, 5);
    for (const Sample* x : {&strided, &gapped, &misplaced}) {
      all_pairs(*x, *x);
      search(*x, *x, {5}, true);
      ranges(*x, *x);
      floats(2, *x);
      scores(2, *x, {5});
    }
    batches();
    for (int64_t dim : {1, 7, 16, 19, 128})
      for (int64_t gap : {0, 1}) codes_of_numbers(dim, gap);
    // Several slices and merges; lists that fill up and shrink; slices of sums.
    const Sample one(64, 1), nine(64, 9), x(64, 2600);
    search(one, x, {10}, true);
    search(nine, x, {3, 300});
    search(one, x, {2048});
    ranges(nine, x);
    visits(nine, x, 3, {4});
    visits(one, x, 1, {30});
    visits(nine, Sample(64, 20), 6, {7});
    floats(1, Sample(40, 2500));
    scores(1, Sample(40, 5000), {20});
    scores(3, Sample(1030, 1100), {2048});
  });
  return report();
}
