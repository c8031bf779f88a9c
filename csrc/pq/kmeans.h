// SPDX-License-Identifier: Apache-2.0
// Lloyd's k-means, plain or accelerated, of M independent sets of sub-vectors, with the assignment
// of assign.h. Results depend on the seed and on nothing else: centroids are sums in double, in the
// order of the rows.
#pragma once
#include <cstdint>

#include "pq/assign.h"

namespace pentad::pq {

// x: (n, M, dim) float32, finite, n >= k >= 1. centroids: (M, k, dim).
struct Clustering {
  Array3 x;
  int64_t k;
  float* centroids;
  // (M, k, dim), read and written, equal to the centroids before the first call: iterations go
  // beyond the means with Nesterov's momentum, which starts anew where it would lead uphill
  // (O'Donoghue and Candes 2015, "Adaptive restart for accelerated gradient schemes", the gradient
  // scheme). The objective has one gradient per assignment, so this is descent with momentum on a
  // piecewise quadratic function. Null: plain iterations, which the last should be.
  float* before = nullptr;
};

// k-means++ (Arthur and Vassilvitskii 2007) on a sample of up to 32 rows per centroid: every next
// centroid is a row drawn with probability proportional to its squared distance from those before.
void kmeans_start(const Clustering&, uint64_t seed);

// Up to `iterations` times: the nearest centroid of every row, then the mean of every centroid's
// rows; for cosine the direction of their sum. A centroid without rows takes the row that lies
// farthest from its own, of those that share theirs. codes: (M, n), read and written, -1 before the
// first call. False where x or the centroids were not finite; stable[m] whether nothing changed any
// more.
bool kmeans_steps(const Clustering&, Nearest, int64_t iterations, int32_t* codes, uint8_t* stable);

}  // namespace pentad::pq
