// SPDX-License-Identifier: Apache-2.0
// Linear recurrences whose state is a matrix: SSD (Mamba-2; Dao & Gu, arXiv 2405.21060), linear
// attention with and without decay (arXiv 2006.16236, 2307.08621, 2312.06635) and the delta rule
// (arXiv 2406.06484, gated: 2412.06464). Conventions of scan.h: operands, `begin`, `reverse`.
#pragma once
#include "scan/matrix_scan_kernels.h"
#include "scan/scan.h"

namespace pentad::scan {

// Per sequence and head h, with a state S of (keys n) x (values p), group g = h / (heads / groups):
//
//   S_t = a_t S_{t-1} + k_t u_t^T                      a_t a number, or one per key: diag(a_t)
//   u_t = w_t v_t, or with `delta`  w_t (v_t - (a_t S_{t-1})^T k_t)
//   o_t = scale S_t^T q_t + d v_t
//
// Decays come as they are, not as logarithms: 0, 1, negative ones and those above 1 are all exact,
// and each has a gradient. With G_t, D_t and H_t the gradients of S_t, of u_t and of a_t S_{t-1},
// and y'_t = scale do_t:
//
//   G_t  = q_t y'_t^T + a_{t+1} H_{t+1}     D_t = G_t^T k_t     H_t = G_t, delta: G_t - k_t (w_t D_t)^T
//   dq_t = S_t y'_t                         dv_t = w_t D_t + d do_t          dd = sum_t do_t v_t
//   dk_t = G_t u_t, delta: G_t u_t - a_t S_{t-1} (w_t D_t)                  (q, k: summed over heads)
//   dw_t = D_t . v_t, delta: D_t . (v_t - (a_t S_{t-1})^T k_t)
//   da_t = <S_{t-1}, H_t>, or row by row where there is one decay per key
//
// SSD: q = C, k = B, v = x, w = dt, a = exp(dt A). Delta rule: w = beta.
//
// Error budget: fp32 from the reading of the inputs to the rounding of the outputs. With one decay
// per head, products of a chunk's decays are taken by multiplication, never by division or by
// differences of logarithms; they must be finite, which those of decays below 4 are.
struct MatrixScan {
  int64_t batch = 0, length = 0, heads = 0, groups = 1, keys = 0, values = 0;
  bool delta = false, reverse = false;
  bool key_decay = false;  // a has one decay per key
  double scale = 1.0;
  Operand q, k;     // (b, t, g, n): f32, bf16, f16 or f64, as v
  Operand v;        // (b, t, h, p)
  Operand a;        // (b, t, h) or (b, t, h, n), f32 (f64); absent: 1
  Operand w;        // (b, t, h), f32 (f64); absent: 1
  Operand d;        // (h, p), f32 (f64); may be absent
  Operand initial;  // (sequence, h, n, p), f32 (f64); absent: zeros
  std::vector<int64_t> begin;

  int64_t sequences() const { return begin.empty() ? batch : int64_t(begin.size()) - 1; }
};

// States before every kMatrixChunk-th step, f32 [chunk][h][n][p]; chunks as in stored_chunks.
static inline int64_t stored_matrices(int64_t batch, int64_t length, bool packed,
                                      int64_t sequences) {
  if (packed) return length / kMatrixChunk + sequences;
  return batch * ((length + kMatrixChunk - 1) / kMatrixChunk);
}

// out: (b, t, h, p), dtype of v. last: (sequence, h, n, p), f32 (f64), or absent. stored: floats
// [stored_matrices][h][n][p], or null (and null with f64).
void matrix_scan_forward(const MatrixScan&, const Operand& out, const Operand& last, float* stored);

// d_out, d_last: given (either may be absent: zero). dq, dk, dv: dtype and indices of their inputs;
// da, dw, dd, dinitial: f32 (f64). Any may be absent. All are overwritten; none may overlap.
struct MatrixScanGradients {
  Operand d_out, d_last;
  const float* stored = nullptr;
  Operand dq, dk, dv, da, dw, dd, dinitial;
};
void matrix_scan_backward(const MatrixScan&, const MatrixScanGradients&);

// One token on a cache, in place, by the same equations: state (row, h, n, p), f32, bf16, f16 or
// f64, rounded when stored but not before out is taken; q, k (b, g, n), v, out (b, h, p), one dtype;
// a (b, h) or (b, h, n), w (b, h), d (h, p): f32 (f64). rows as in StateUpdate.
struct MatrixUpdate {
  int64_t batch = 0, heads = 0, groups = 1, keys = 0, values = 0;
  bool delta = false, key_decay = false;
  double scale = 1.0;
  Operand state, q, k, v, a, w, d, out;
  std::vector<int64_t> rows;
};
void matrix_update(const MatrixUpdate&);

// The definitions: plain loops, double sums.
void reference_matrix_scan_forward(const MatrixScan&, const Operand& out, const Operand& last);
void reference_matrix_scan_backward(const MatrixScan&, const MatrixScanGradients&);
void reference_matrix_update(const MatrixUpdate&);

}  // namespace pentad::scan
