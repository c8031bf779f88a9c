// SPDX-License-Identifier: Apache-2.0
// The nearest centroid of every sub-vector, without the (n, M, K) distances.
//
// For a row x and the K centroids c_k of its codebook, of dimension d, the cost D_k is, in double:
//
//   l2      sum_j ((double)x_j - (double)c_kj)^2
//   ip      -sum_j (double)x_j (double)c_kj
//   cosine  -(sum_j (double)x_j (double)c_kj) / |c_k|,  |c_k| = sqrt(sum_j c_kj^2); 0 where c_k = 0
//
// every sum in the order of j, without fused multiply-adds. The code is the k of the least D_k, the
// smaller k of equals. That is the definition (assign_reference.cc); it depends on no
// instruction-set level, number of threads or batch.
//
// The fast way (assign.cc) computes scores s_k = x'.c'_k - b_k in float32, where for l2
// x' = x - mu, c' = c - mu, b = |c'|^2 / 2 with mu the mean centroid, for ip x' = x, c' = c, b = 0
// and for cosine x' = x, c' = c / |c|, b = 0: the larger, the nearer. It keeps the best and the
// second best of every row. With u = 2^-24, X = |x'|, C = max_k |c'_k| the score differs from the
// exact one, which orders as D does, by at most
//
//   E = 1.0625 u [(d + 4) (X C + C^2 / 2) + (X + C)^2] + d 2^-124 (1 + X + C):
//
// d + 1 roundings of a sum whose terms are at most X C + C^2 / 2 together, with one more for each
// product where nothing is fused and one for b; the roundings of x' and c', at most u of each
// element, which move |x' - c'|^2 / 2 by u (X + C)^2; underflow, flushed to zero or not; and the
// roundings of D itself, 2^-29 of the others. A row is settled where best - second > 2 E. For any
// other row, and where X C + C^2 + X^2 is too large for a float, D is computed for all centroids
// of score at least best - 2 E (for all, in the second case). So the result is that of the
// definition.
//
// Many centroids of 32 dimensions or more are scored by products of bf16 where the level has them,
// within 1.0625 E + 1.03 (|x' - bf(x')| C + |bf(x')| max_k |c'_k - bf(c'_k)|). Float32 then decides
// between the groups of eight that may hold the best; rows with more than two are done again, in
// float32.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace pentad::pq {

enum class Nearest : int { l2, ip, cosine };

// x: (n, M, dim), element (i, m, j) at i * strides[0] + m * strides[1] + j * strides[2]; the parts
// of a product codebook, or with stride 0 over m the same row for every codebook.
// codebooks: (M, K, dim), the same way.
struct Array3 {
  const void* data;
  DType dtype;  // f32, f16, bf16, f64
  int64_t shape[3];
  int64_t strides[3];
};

struct Assigned {
  void* codes;       // (n, M, top), contiguous
  bool wide;         // int32; else uint8
  int64_t top;       // the `top` nearest, nearest first; 1 <= top <= K
  float* distances;  // (n, M, top): D, rounded; may be null
};

enum class Verdict { fine, bad_vectors, bad_centroids };  // the latter two: NaN or infinity

constexpr int64_t kMostCentroids = 65536;
constexpr int64_t kMostAssignDim = 1 << 17;  // E is not proven beyond

// K >= 1, dim >= 1. Outputs are undefined unless the verdict is fine.
Verdict assign(const Array3& x, const Array3& codebooks, Nearest, const Assigned&);
Verdict assign_reference(const Array3& x, const Array3& codebooks, Nearest, const Assigned&);

// The cost D of float32 rows. `norm` is |c|, for cosine.
double nearest_cost(const float* x, const float* c, int64_t dim, Nearest, double norm);
// Those to eight centroids at a time, each with the bits of nearest_cost.
void nearest_costs(const float* x, const float* const* c, int64_t dim, Nearest, const double* norm,
                   double* cost);
double centroid_norm(const float* c, int64_t dim);

}  // namespace pentad::pq
