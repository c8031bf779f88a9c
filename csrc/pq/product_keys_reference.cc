// SPDX-License-Identifier: Apache-2.0
// The definition of product-key memory, by plain loops.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/reals.h"
#include "pq/product_keys.h"

namespace pentad::pq::reference {
namespace {

double at(const TensorView& x, int64_t i, int64_t j, int64_t k = 0, int64_t l = 0) {
  const int64_t index[] = {i, j, k, l};
  int64_t offset = 0;
  for (int d = 0; d < x.rank; ++d) offset += index[d] * x.strides[d];
  return read_real(x.data, x.dtype, offset);
}

double read(const void* data, bool wide, int64_t i) {
  return read_real(data, wide ? DType::f64 : DType::f32, i);
}

// In the arithmetic of T: float, or double for f64.
template <class T>
std::vector<T> half_scores(const ProductKeys& in, int64_t row, int64_t head, int half) {
  std::vector<T> scores(in.keys());
  for (int64_t i = 0; i < in.keys(); ++i) {
    T sum = 0;
    for (int64_t d = 0; d < in.half(); ++d) {
      const T product = static_cast<T>(at(in.q, row, head, half * in.half() + d)) *
                        static_cast<T>(at(in.subkeys, head, half, i, d));
      sum = sum + product;
    }
    scores[i] = sum;
  }
  return scores;
}

// Positions in the order of the scores: larger, then smaller position; NaN first.
template <class T>
std::vector<int64_t> order(const std::vector<T>& scores) {
  std::vector<int64_t> places(scores.size());
  for (size_t i = 0; i < places.size(); ++i) places[i] = i;
  std::stable_sort(places.begin(), places.end(), [&](int64_t x, int64_t y) {
    return PairSum(scores[x], 0).above(PairSum(scores[y], 0));
  });
  return places;
}

struct Pair {
  PairSum score;
  int64_t index;

  bool operator<(const Pair& other) const {
    if (score.above(other.score)) return true;
    return !other.score.above(score) && index < other.index;
  }
};

template <class T>
void forward(const ProductKeys& in, const ProductKeysOut& out, bool all_pairs) {
  const int64_t n = in.keys(), k = in.k, heads = in.heads(), dv = in.dv();
  parallel_for(in.rows(), [&](int64_t row) {
    std::vector<T> sums(dv);
    for (int64_t head = 0; head < heads; ++head) {
      if (in.per_head) std::fill(sums.begin(), sums.end(), T{0});
      const std::vector<T> first = half_scores<T>(in, row, head, 0);
      const std::vector<T> second = half_scores<T>(in, row, head, 1);
      const std::vector<int64_t> i = order(first), j = order(second);
      std::vector<Pair> pairs;
      for (int64_t a = 0; a < n; ++a)
        for (int64_t b = 0; b < n && (all_pairs || (a + 1) * (b + 1) <= k); ++b)
          pairs.push_back({PairSum(first[i[a]], second[j[b]]), i[a] * n + j[b]});
      std::partial_sort(pairs.begin(), pairs.begin() + k, pairs.end());
      std::vector<double> weights(k);
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        weights[p] = in.softmax ? std::exp(in.scale * (pairs[p].score.high - pairs[0].score.high))
                                : in.scale * pairs[p].score.high;
        sum += weights[p];
      }
      for (int64_t p = 0; p < k; ++p) {
        const int64_t entry = (row * heads + head) * k + p;
        const T weight = static_cast<T>(in.softmax ? weights[p] / sum : weights[p]);
        out.indices[entry] = pairs[p].index;
        static_cast<T*>(out.weights)[entry] = weight;
        for (int64_t d = 0; d < dv; ++d) {
          const T product = weight * static_cast<T>(at(in.values, pairs[p].index, d));
          sums[d] = sums[d] + product;
        }
      }
      if (in.per_head || head == heads - 1)
        for (int64_t d = 0; d < dv; ++d)
          write_real(out.out, in.values.dtype, (in.per_head ? row * heads + head : row) * dv + d,
                     sums[d]);
    }
  });
}

}  // namespace

void product_keys(const ProductKeys& in, const ProductKeysOut& out, bool all_pairs) {
  if (in.wide()) forward<double>(in, out, all_pairs);
  else forward<float>(in, out, all_pairs);
}

void product_keys_backward(const ProductKeys& in, const ProductKeysGrad& grad) {
  const int64_t n = in.keys(), k = in.k, heads = in.heads(), half = in.half(), dv = in.dv();
  std::vector<int64_t> place;  // of a value row in d_values
  if (grad.touched) {
    std::vector<int64_t> rows(grad.indices, grad.indices + in.entries());
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    std::copy(rows.begin(), rows.end(), grad.touched);
    place.resize(n * n);
    for (size_t i = 0; i < rows.size(); ++i) place[rows[i]] = i;
  }
  std::vector<double> d_q(in.rows() * heads * 2 * half), d_subkeys(heads * 2 * n * half);
  std::vector<double> d_values;
  if (grad.d_values)
    d_values.resize((grad.touched ? count_distinct(grad.indices, in.entries(), n * n) : n * n) *
                    dv);
  std::vector<double> d_weights(k);
  for (int64_t row = 0; row < in.rows(); ++row)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t entry = (row * heads + head) * k;
      const int64_t group = in.per_head ? row * heads + head : row;
      double mean = 0;
      for (int64_t p = 0; p < k; ++p) {
        const int64_t value = grad.indices[entry + p];
        const double weight = read(grad.weights, in.wide(), entry + p);
        double dot = grad.d_weights ? read(grad.d_weights, in.wide(), entry + p) : 0;
        for (int64_t d = 0; d < dv && grad.d_out.data; ++d) {
          const double g = at(grad.d_out, group, d);
          dot += g * at(in.values, value, d);
          if (grad.d_values) d_values[(grad.touched ? place[value] : value) * dv + d] += weight * g;
        }
        d_weights[p] = dot;
        mean += weight * dot;
      }
      for (int64_t p = 0; p < k; ++p) {
        const int64_t value = grad.indices[entry + p];
        const double weight = read(grad.weights, in.wide(), entry + p);
        const double d_score =
            in.scale * (in.softmax ? weight * (d_weights[p] - mean) : d_weights[p]);
        for (int h = 0; h < 2; ++h) {
          const int64_t key = h ? value % n : value / n;
          for (int64_t d = 0; d < half; ++d) {
            d_q[((row * heads + head) * 2 + h) * half + d] +=
                d_score * at(in.subkeys, head, h, key, d);
            d_subkeys[((head * 2 + h) * n + key) * half + d] +=
                d_score * at(in.q, row, head, h * half + d);
          }
        }
      }
    }
  const auto write = [](const std::vector<double>& from, void* to, DType dtype) {
    if (!to) return;
    for (size_t i = 0; i < from.size(); ++i) write_real(to, dtype, i, from[i]);
  };
  write(d_q, grad.d_q, in.q.dtype);
  write(d_subkeys, grad.d_subkeys, in.subkeys.dtype);
  write(d_values, grad.d_values, in.values.dtype);
}

}  // namespace pentad::pq::reference
