// SPDX-License-Identifier: Apache-2.0
// The kernels of recurrences with one decay per head and step (matrix_scan.h), chunk by chunk.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::scan {

// Steps that are taken at once as matrix products, and between stored states.
constexpr int64_t kMatrixChunk = 64;

// Element (head, row, column) at data + head * `head` + row * `row` + column * `column`; rows are
// steps in the order of the recurrence, or keys. Null: absent.
struct Rows {
  void* data;
  DType dtype;
  int64_t head, row, column;
};

// One sequence of some heads: the whole walk over time.
struct MatrixJob {
  int64_t steps, heads, keys, values;
  int64_t shared;  // heads that have q and k in common
  bool delta;
  float scale;
  Rows q, k;            // (h / shared, t, n)
  Rows v;               // (h, t, p)
  Rows a, w;            // (h, t, -), f32
  Rows d;               // (h, -, p), f32
  Rows initial;         // (h, n, p), f32
  float* stored;        // of the first chunk and head: [chunk][h][n][p], or null
  int64_t stored_step;  // from chunk to chunk
  float* scratch;
};

struct MatrixForwardJob {
  MatrixJob scan;
  Rows out, last;
};

// dq and dk are overwritten with the sums over the heads that share q and k; dd is added to.
struct MatrixBackwardJob {
  MatrixJob scan;
  Rows d_out, d_last, dq, dk, dv, da, dw, dd, dinitial;
};

// out_rc = the sum over the pieces, in order, of parts[piece][row][column].
struct MatrixSumJob {
  const float* parts;
  int64_t pieces, piece, row;  // piece, row: from one to the next
  int64_t rows, columns;
  Rows out;
};

// Floats of scratch that a job needs, at any level.
static constexpr int64_t matrix_scratch(int64_t heads, int64_t keys, int64_t values,
                                        bool backward) {
  const int64_t n = keys + 16, p = values + 16, q = kMatrixChunk;
  return heads * n * p +
         (backward ? 7 * n * q + 10 * p * q + n * p + 9 * q * q
                   : 4 * n * q + 5 * p * q + 4 * q * q) +
         32 * q;
}

}  // namespace pentad::scan
