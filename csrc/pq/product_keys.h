// SPDX-License-Identifier: Apache-2.0
// Product-key memory (Lample et al. 2019, "Large Memory Layers with Product Keys", section 3).
//
//   s_1[i] = q_1 . subkeys[h, 0, i]        s_2[j] = q_2 . subkeys[h, 1, j]        i, j < n
//   score(i, j) = s_1[i] + s_2[j]          of value row i n + j
//   out = sum_h sum_(k best) w values[i n + j],    w = softmax(scale * score) over the k best
//
// q (rows, heads, 2 half), subkeys (heads, 2, n, half), values (n n, dv); out (rows, dv), or
// (rows, heads, dv) without the sum over heads.
//
// Everything is defined to the last bit, so that no instruction-set level, thread count or batch
// changes what is selected or returned:
//   - Half scores are chains in float32, s = s + q[d] * key[d] for d = 0, 1, ..., each product and
//     each sum rounded (half dtypes are widened first; float64 is computed in float64). Unfused
//     chains cost no time where additions have units of their own beside the multipliers.
//   - Order within a half: the larger score, then the smaller i. NaN is larger than everything.
//   - Order of the pairs: the larger exact sum of the two (float32) half scores, then the smaller
//     i n + j. With exact sums, a pair whose both halves rank lower comes later, so that only pairs
//     (a, b) of ranks with (a + 1)(b + 1) <= k can win: 119 instead of 1024 for k 32. Where a half
//     score is NaN or infinite many sums are equal, and only those pairs are compared.
//   - Weights: scores as doubles, exp in double, the sum in order of rank; then rounded to float32.
//     Without softmax w = scale * score.
//   - out: a chain in float32 over heads, then ranks, each product and sum rounded.
// Gradients, through the selected entries alone: dw = d_out . value as 16 interleaved chains,
// folded pairwise; each entry of d_q, d_subkeys and d_values one chain in the order of rows, heads,
// ranks. Entries that share a sub-key are first added up per row. Rounding errors are those of
// float32 sums of these lengths.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace pentad::pq {

constexpr int64_t kMostSubkeys = 65536;  // per half: a value row is 32 bits

// dtypes f32, f16, bf16 in any mixture, or all f64; any strides.
struct ProductKeys {
  TensorView q, subkeys, values;
  int64_t k;  // 1 to n n
  double scale;
  bool softmax;
  bool per_head;

  constexpr int64_t rows() const { return q.shape[0]; }
  constexpr int64_t heads() const { return q.shape[1]; }
  constexpr int64_t half() const { return subkeys.shape[3]; }
  constexpr int64_t keys() const { return subkeys.shape[2]; }
  constexpr int64_t dv() const { return values.shape[1]; }
  constexpr int64_t entries() const { return rows() * heads() * k; }
  constexpr int64_t groups() const { return rows() * (per_head ? heads() : 1); }  // rows of out
  constexpr int64_t per_group() const { return k * (per_head ? 1 : heads()); }    // entries of each
  bool wide() const { return q.dtype == DType::f64; }
};

// All contiguous. out in the dtype of values; weights f32, or f64 with f64.
struct ProductKeysOut {
  void* out;
  int64_t* indices;  // (rows, heads, k), best first
  void* weights;
};

// What came out and what came back; d_out (groups, dv) and d_weights like weights may be null.
// Gradients are contiguous, in the dtype of what they belong to; null where not wanted.
struct ProductKeysGrad {
  const int64_t* indices;
  const void* weights;
  TensorView d_out;  // any float dtype and strides; data null: zero
  const void* d_weights;
  void* d_q;
  void* d_subkeys;
  void* d_values;  // (n n, dv), or with touched (count, dv)
  // Sparse: the count_distinct(indices) rows of values that were selected, rising.
  int64_t* touched;
};

void product_keys(const ProductKeys&, const ProductKeysOut&);
void product_keys_backward(const ProductKeys&, const ProductKeysGrad&);
// Different numbers among `count` in [0, limit).
int64_t count_distinct(const int64_t* indices, int64_t count, int64_t limit);

// The definition, by plain loops over all n n pairs. Over those that can win, it serves f64.
namespace reference {
void product_keys(const ProductKeys&, const ProductKeysOut&, bool all_pairs = true);
void product_keys_backward(const ProductKeys&, const ProductKeysGrad&);
}  // namespace reference

// The exact sum of two floats or doubles as the rounded one and the rest, for comparison.
struct PairSum {
  double high, low;

  PairSum(double a, double b) : high(a + b) {
    const double part = high - a;
    low = high - high == 0 ? (a - (high - part)) + (b - part) : 0;
  }
  // NaN comes first.
  bool above(const PairSum& other) const {
    if (high != high || other.high != other.high) return high != high && other.high == other.high;
    return high != other.high ? high > other.high : low > other.low;
  }
};

}  // namespace pentad::pq
