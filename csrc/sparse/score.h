// SPDX-License-Identifier: Apache-2.0
// Inner products of sparse rows, and their gradients.
//
//   queries  nq rows, q_bj; docs  n rows, v_dj: in the one form of sparse/csr.h
//
//   score(b, d) = sum over the terms j that both have, rising, of (double) q_bj * (double) v_dj
//
// rounded once to float (not at all for double), -0 as 0: the same bits however the work is cut.
// The dense (nq, V) and (n, V) never exist.
//
// Gradients, with g the gradient of the scores, on the non-zeros alone, summed in double:
//   d_q(b, j) = sum_d g(b, d) v_dj,   d_v(d, j) = sum_b g(b, d) q_bj
// One of the two is summed by pieces of the rows whose number depends on the shapes alone, so the
// bits do not depend on the number of threads either. With pairs, g has one number per pair and the
// sums run over the pairs of a row, rising.
#pragma once
#include <cstdint>

#include "sparse/csr.h"

namespace pentad::sparse {

// out (nq, n). T is float or double here and below.
template <class T>
void score(const Rows<T>& queries, const Rows<T>& docs, T* out);

// d_out (nq, n), contiguous; either gradient, of that side's values, may be null.
template <class T>
void score_backward(const Rows<T>& queries, const Rows<T>& docs, const T* d_out, T* d_queries,
                    T* d_docs);

// Scores of pairs i of the rows query[i] and doc[i], which exist: out (count).
struct Pairs {
  int64_t count;
  const int64_t* query;
  const int64_t* doc;
};
template <class T>
void score_pairs(const Rows<T>& queries, const Rows<T>& docs, const Pairs& pairs, T* out);
template <class T>
void score_pairs_backward(const Rows<T>& queries, const Rows<T>& docs, const Pairs& pairs,
                          const T* d_out, T* d_queries, T* d_docs);

}  // namespace pentad::sparse
