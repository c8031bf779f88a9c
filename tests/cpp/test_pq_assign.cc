// SPDX-License-Identifier: Apache-2.0
// Every level against the definition: codes and distances bit for bit, ties and near ties included.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "pq/assign.h"
#include "pq/kmeans.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937 random_bits(5);

struct Case {
  int64_t n, M, K, dim;
  std::vector<float> x, codebooks;

  // kind 0: normal; 1: every centroid twice; 2: small integers, equal distances; 3: far from zero;
  // 4: squares beyond float; 5: denormals.
  Case(int64_t n, int64_t M, int64_t K, int64_t dim, int kind) : n(n), M(M), K(K), dim(dim) {
    std::normal_distribution<float> normal;
    const auto draw = [&] {
      const float v = normal(random_bits);
      switch (kind) {
        case 2: return std::round(v);
        case 3: return v + 1000;
        case 4: return v * 1e30f;
        case 5: return v * 1e-40f;
        default: return v;
      }
    };
    for (int64_t i = 0; i < n * M * dim; ++i) x.push_back(draw());
    for (int64_t i = 0; i < M * K * dim; ++i) codebooks.push_back(draw());
    if (kind == 1)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t k = K / 2; k < K; ++k)
          std::copy_n(&codebooks[(m * K + k - K / 2) * dim], dim, &codebooks[(m * K + k) * dim]);
  }
  Array3 vectors() const { return {x.data(), DType::f32, {n, M, dim}, {M * dim, dim, 1}}; }
  Array3 books() const { return {codebooks.data(), DType::f32, {M, K, dim}, {K * dim, dim, 1}}; }
};

struct Result {
  std::vector<int32_t> codes;
  std::vector<float> distances;
  bool operator==(const Result& other) const {
    return codes == other.codes &&
           !std::memcmp(distances.data(), other.distances.data(), distances.size() * sizeof(float));
  }
};

template <class Function>
Result run(Function function, const Case& c, Nearest metric, int64_t top) {
  Result result{std::vector<int32_t>(c.n * c.M * top + 1), std::vector<float>(c.n * c.M * top + 1)};
  const Assigned out{result.codes.data(), true, top, result.distances.data()};
  CHECK(function(c.vectors(), c.books(), metric, out) == Verdict::fine);
  return result;
}

void levels_agree() {
  const int64_t shapes[][4] = {{0, 2, 5, 3},    {1, 1, 1, 1},    {7, 3, 5, 2},    {100, 2, 16, 8},
                               {97, 1, 64, 17}, {33, 2, 65, 33}, {50, 2, 256, 8}, {49, 1, 700, 64}};
  const Isa before = isa();
  const int threads_before = num_threads();
  for (const auto& s : shapes)
    for (int kind = 0; kind < 6; ++kind)
      for (Nearest metric : {Nearest::l2, Nearest::ip, Nearest::cosine}) {
        const Case c(s[0], s[1], s[2], s[3], kind);
        for (int64_t top : {int64_t{1}, std::min<int64_t>(s[2], 4)}) {
          const Result want = run(assign_reference, c, metric, top);
          for (Isa level : isa_available()) {
            set_isa(level);
            for (int threads : {1, 3}) {
              set_num_threads(threads);
              CHECK(run(assign, c, metric, top) == want, name(level), s[0], s[1], s[2], s[3], kind,
                    static_cast<int>(metric), top);
            }
          }
        }
      }
  set_isa(before);
  set_num_threads(threads_before);
}

void strange_numbers() {
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf("")})
    for (Isa level : isa_available()) {
      set_isa(level);
      Case c(70, 2, 20, 5, 0);
      std::vector<int32_t> codes(c.n * c.M);
      const Assigned out{codes.data(), true, 1, nullptr};
      CHECK(assign(c.vectors(), c.books(), Nearest::l2, out) == Verdict::fine);
      for (size_t at : {size_t{0}, c.x.size() - 1, size_t{333}}) {
        const float good = std::exchange(c.x[at], bad);
        CHECK(assign(c.vectors(), c.books(), Nearest::ip, out) == Verdict::bad_vectors, at);
        c.x[at] = good;
      }
      c.codebooks.back() = bad;
      CHECK(assign(c.vectors(), c.books(), Nearest::cosine, out) == Verdict::bad_centroids);
    }
}

// Strides of every kind, and half floats: the same codes as a copy's.
void layouts() {
  const Case c(90, 3, 40, 6, 0);
  const int64_t width = c.M * c.dim;
  const Result want = run(assign, c, Nearest::l2, 1);
  std::vector<float> wide(c.n * width * 2);
  for (int64_t i = 0; i < c.n * width; ++i) wide[i * 2] = c.x[i];
  std::vector<float> columns(c.n * width);
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < width; ++j) columns[j * c.n + i] = c.x[i * width + j];
  const Array3 views[] = {
      {wide.data(), DType::f32, {c.n, c.M, c.dim}, {2 * width, 2 * c.dim, 2}},
      {columns.data(), DType::f32, {c.n, c.M, c.dim}, {1, c.dim * c.n, c.n}},
  };
  for (const Array3& view : views) {
    std::vector<int32_t> codes(c.n * c.M + 1);
    CHECK(assign(view, c.books(), Nearest::l2, {codes.data(), true, 1, nullptr}) == Verdict::fine);
    CHECK(codes == want.codes);
  }
  std::vector<uint8_t> narrow(c.n * c.M);
  assign(c.vectors(), c.books(), Nearest::l2, {narrow.data(), false, 1, nullptr});
  CHECK(std::equal(narrow.begin(), narrow.end(), want.codes.begin()));
  std::vector<uint16_t> half(c.x.size());
  Case rounded = c;
  for (size_t i = 0; i < half.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &c.x[i], 4);
    half[i] = static_cast<uint16_t>(bits >> 16), bits &= 0xffff0000;
    std::memcpy(&rounded.x[i], &bits, 4);
  }
  std::vector<int32_t> codes(c.n * c.M + 1);
  Array3 view = c.vectors();
  view.data = half.data(), view.dtype = DType::bf16;
  assign(view, c.books(), Nearest::l2, {codes.data(), true, 1, nullptr});
  CHECK(codes == run(assign_reference, rounded, Nearest::l2, 1).codes);
}

void clustering() {
  const Case c(600, 3, 1, 5, 0);
  std::vector<float> first;
  for (Isa level : isa_available())
    for (int threads : {1, 2, 3, 5}) {
      set_isa(level);
      set_num_threads(threads);
      std::vector<float> centroids(c.M * 20 * c.dim);
      std::vector<int32_t> codes(c.M * c.n, -1);
      std::vector<uint8_t> stable(c.M);
      const Clustering sets{c.vectors(), 20, centroids.data()};
      kmeans_start(sets, 9);
      CHECK(kmeans_steps(sets, Nearest::l2, 100, codes.data(), stable.data()));
      CHECK(stable[0] && stable[1] && stable[2]);
      if (first.empty()) first = centroids;
      CHECK(centroids == first, name(level), threads);
      for (int32_t code : codes) CHECK(code >= 0 && code < 20);
    }
  Case bad = c;
  bad.x[77] = std::nanf("");
  std::vector<float> centroids(c.M * 4 * c.dim);
  std::vector<int32_t> codes(c.M * c.n, -1);
  std::vector<uint8_t> stable(c.M);
  kmeans_start({bad.vectors(), 4, centroids.data()}, 0);
  CHECK(!kmeans_steps({bad.vectors(), 4, centroids.data()}, Nearest::l2, 2, codes.data(),
                      stable.data()));
}

}  // namespace

int main() {
  levels_agree();
  const Isa best = isa_available().back();
  strange_numbers();
  set_isa(best);
  layouts();
  clustering();
  return report();
}
