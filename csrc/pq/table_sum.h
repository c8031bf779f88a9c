// SPDX-License-Identifier: Apache-2.0
// Asymmetric distance computation (Jegou, Douze, Schmid 2011, "Product quantization for nearest
// neighbor search", section 3): a table of scores per query and subspace, and their sums by codes.
//
//   score_tables  queries (nq, M * width), codebooks (M, K, width) -> tables (nq, M, K):
//                   l2: sum_d (q_d - c_d)^2,  ip: sum_d q_d c_d
//                 over rising d in double, each operation rounded, the sum rounded to the tables'
// type
//   table_sum     tables (nq, M, K), codes (n, M) -> out (nq, n):
//                   out(q, i) = ((T[q][0][c_i0] + T[q][1][c_i1]) + ...) in the tables' type
//   table_sum_backward: d_tables(q, m, k) = sum of d_out(q, i) over i with c_im = k, rising i
//
// float32 or float64. No level, number of threads or batch changes a bit.
#pragma once
#include "pq/lookup.h"

namespace pentad::pq {

// Contiguous unless a stride is given (in elements).
struct ScoreTables {
  DType dtype;
  int64_t queries, subspaces, levels, width;
  const void* q;
  int64_t q_row_stride, q_stride;
  const void* codebooks;
  int64_t c_stride[3];
  bool inner_product;
};
void score_tables(const ScoreTables& problem, void* tables);

// tables (queries, M, levels) and out (queries, n), contiguous. Throws std::invalid_argument for a
// code of `levels` or above.
void table_sum(const char* op, const void* tables, DType dtype, int64_t queries, int64_t levels,
               const Codes& codes, void* out);
void table_sum_backward(const char* op, const void* d_out, DType dtype, int64_t row_stride,
                        int64_t stride, int64_t queries, int64_t levels, const Codes& codes,
                        void* d_tables);

}  // namespace pentad::pq
