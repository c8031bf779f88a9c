// SPDX-License-Identifier: Apache-2.0
// The definition of assign.h, in plain loops; also what serves float64.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/reals.h"
#include "pq/assign.h"

namespace pentad::pq {
namespace {

template <int kCount, class T>
void costs_of(const T* x, const T* const* c, int64_t dim, Nearest metric, const double* norm,
              double* cost) {
  double sum[kCount] = {};
  if (metric == Nearest::l2) {
    for (int64_t j = 0; j < dim; ++j)
      for (int i = 0; i < kCount; ++i) {
        const double difference = static_cast<double>(x[j]) - static_cast<double>(c[i][j]);
        sum[i] += difference * difference;
      }
    std::copy_n(sum, kCount, cost);
    return;
  }
  for (int64_t j = 0; j < dim; ++j)
    for (int i = 0; i < kCount; ++i)
      sum[i] += static_cast<double>(x[j]) * static_cast<double>(c[i][j]);
  for (int i = 0; i < kCount; ++i) {
    if (metric == Nearest::ip) cost[i] = -sum[i];
    else cost[i] = norm[i] > 0 ? -(sum[i] / norm[i]) : 0;
  }
}

template <class T>
double cost_of(const T* x, const T* c, int64_t dim, Nearest metric, double norm) {
  double cost;
  costs_of<1>(x, &c, dim, metric, &norm, &cost);
  return cost;
}

template <class T>
double norm_of(const T* c, int64_t dim) {
  double sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += static_cast<double>(c[j]) * static_cast<double>(c[j]);
  return std::sqrt(sum);
}

// Row (i, m) in double; whether it is finite.
bool read_row(const Array3& array, int64_t i, int64_t m, double* row) {
  const int64_t first = i * array.strides[0] + m * array.strides[1];
  bool finite = true;
  for (int64_t j = 0; j < array.shape[2]; ++j) {
    row[j] = read_real(array.data, array.dtype, first + j * array.strides[2]);
    finite = finite && std::isfinite(row[j]);
  }
  return finite;
}

}  // namespace

double nearest_cost(const float* x, const float* c, int64_t dim, Nearest metric, double norm) {
  return cost_of(x, c, dim, metric, norm);
}

void nearest_costs(const float* x, const float* const* c, int64_t dim, Nearest metric,
                   const double* norm, double* cost) {
  costs_of<8>(x, c, dim, metric, norm, cost);
}

double centroid_norm(const float* c, int64_t dim) { return norm_of(c, dim); }

Verdict assign_reference(const Array3& x, const Array3& codebooks, Nearest metric,
                         const Assigned& out) {
  const int64_t n = x.shape[0], count = codebooks.shape[0], dim = x.shape[2];
  const int64_t centroids = codebooks.shape[1];
  std::vector<double> c(count * centroids * dim), norms(count * centroids);
  for (int64_t r = 0; r < count * centroids; ++r) {
    if (!read_row(codebooks, r / centroids, r % centroids, c.data() + r * dim))
      return Verdict::bad_centroids;
    norms[r] = norm_of(c.data() + r * dim, dim);
  }

  constexpr int64_t kRows = 16;
  std::atomic<bool> finite = true;
  parallel_for((n + kRows - 1) / kRows, [&](int64_t task) {
    std::vector<double> row(dim);
    std::vector<std::pair<double, int64_t>> costs(centroids);
    for (int64_t i = task * kRows; i < std::min(n, (task + 1) * kRows); ++i)
      for (int64_t m = 0; m < count; ++m) {
        if (!read_row(x, i, m, row.data())) finite = false;
        for (int64_t k = 0; k < centroids; ++k) {
          const int64_t r = m * centroids + k;
          costs[k] = {cost_of(row.data(), c.data() + r * dim, dim, metric, norms[r]), k};
        }
        // By cost, then by k. (NaN, which is refused afterwards, must not be compared.)
        if (!finite) return;
        if (out.top == 1) std::swap(costs[0], *std::min_element(costs.begin(), costs.end()));
        else std::partial_sort(costs.begin(), costs.begin() + out.top, costs.end());
        for (int64_t t = 0; t < out.top; ++t) {
          const int64_t at = (i * count + m) * out.top + t;
          if (out.wide)
            static_cast<int32_t*>(out.codes)[at] = static_cast<int32_t>(costs[t].second);
          else static_cast<uint8_t*>(out.codes)[at] = static_cast<uint8_t>(costs[t].second);
          if (out.distances) out.distances[at] = static_cast<float>(costs[t].first);
        }
      }
  });
  return finite ? Verdict::fine : Verdict::bad_vectors;
}

}  // namespace pentad::pq
