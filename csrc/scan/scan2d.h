// SPDX-License-Identifier: Apache-2.0
// Selective scans over images: the cross-scan of VMamba (Liu et al., arXiv 2401.10166, section 4.2)
// in any orders, and the two-axis recurrence of Mamba2D (arXiv 2412.16146). Conventions of scan.h.
#pragma once
#include "scan/scan.h"
#include "scan/wavefront_kernels.h"

namespace pentad::scan {

// --- Scans of one image in several orders ---------------------------------------------------------
//
// Direction k visits place order_k(t) at step t, and scans what it finds there:
//
//   out at place p = sum_k y_k(t),  order_k(t) = p
//
// with y_k the selective scan of u at order_k(t) with delta_k, A_k, B_k, C_k, D_k. delta, B and C
// lie by place as u does, or by step (delta_k(t) is then that of step t whatever the place). The sum
// over k is fp32, in the order of k, and is rounded once.
struct CrossScan {
  int64_t batch = 0, dim = 0, length = 0, states = 0, directions = 0;
  bool softplus = false;
  bool delta_by_step = false, b_by_step = false, c_by_step = false;
  Operand u;                       // (b, d, p): f32, bf16, f16 or f64, as delta, b and c
  Operand delta;                   // (b, k, d, p)
  Operand a;                       // (k, d, n), f32 (f64)
  Operand b, c;                    // (b, k, n, p)
  Operand d, delta_bias;           // (k, d), f32 (f64); may be absent
  const int32_t* order = nullptr;  // [k][t]: a permutation of the places for each k

  int64_t chunks() const { return batch * directions * stored_chunks(1, length, false, 1); }
};

// out: (b, d, p), dtype of u. stored: floats [b][k][chunk][n][d], or null (and null with f64).
void cross_scan_forward(const CrossScan&, const Operand& out, float* stored);

// d_out: given. du, ddelta: dtype of u. da, dd, ddelta_bias, db, dc: f32 (f64) with the indices of
// their inputs. Any may be absent. All are overwritten; none may overlap.
struct CrossScanGradients {
  Operand d_out;
  const float* stored = nullptr;
  Operand du, ddelta, da, db, dc, dd, ddelta_bias;
};
void cross_scan_backward(const CrossScan&, const CrossScanGradients&);

// --- One recurrence along both axes ---------------------------------------------------------------
//
// Per channel and state, with a left and a top neighbour at place (i, j):
//
//   h_ij = (left_ij + top_ij) / 2      left_ij = exp(dl_ij Al) h_i,j-1 + dl_ij Bl_ij u_ij
//   y_ij = C_ij h_ij + D u_ij          top_ij  = exp(dt_ij At) h_i-1,j + dt_ij Bt_ij u_ij
//
// In the first row h = left, in the first column below it h = top; in the corner h = dl Bl u.
//
// Backward, with g the gradient of h, y' that of y, and s the 1/2 or 1 before each neighbour there:
//
//   g_ij = y'_ij C_ij + s exp(dl_i,j+1 Al) g_i,j+1 + s exp(dt_i+1,j At) g_i+1,j
//   dAl = sum s dl exp(dl Al) h_i,j-1 g      ddl = s (sum_n Al exp(dl Al) h_i,j-1 g + u sum_n g Bl)
//   dBl = sum_d s dl u g                     du  = s (dl sum_n g Bl + dt sum_n g Bt) + D y'
//
// and likewise for the top; dC = sum_d y' h.
struct Wavefront {
  int64_t batch = 0, dim = 0, height = 0, width = 0, states = 0;
  Operand u;      // (b, d, p), p = i * width + j: f32, bf16, f16 or f64, as delta, b and c
  Operand delta;  // (b, axis, d, p): left, top
  Operand a;      // (axis, d, n), f32 (f64)
  Operand b;      // (b, axis, n, p)
  Operand c;      // (b, n, p)
  Operand d;      // (d), f32 (f64); may be absent

  int64_t length() const { return height * width; }
};

// The states above every kBand-th row but the first, f32 [b][band][j][n][d].
static inline int64_t stored_bands(int64_t height) { return height ? (height - 1) / kBand : 0; }

// out: (b, d, p), dtype of u. stored: floats [b][stored_bands][j][n][d], or null (null with f64).
void wavefront_forward(const Wavefront&, const Operand& out, float* stored);

// As in CrossScanGradients.
struct WavefrontGradients {
  Operand d_out;
  const float* stored = nullptr;
  Operand du, ddelta, da, db, dc, dd;
};
void wavefront_backward(const Wavefront&, const WavefrontGradients&);

// --- Definitions ----------------------------------------------------------------------------------
void reference_cross_scan_forward(const CrossScan&, const Operand& out);
void reference_cross_scan_backward(const CrossScan&, const CrossScanGradients&);
void reference_wavefront_forward(const Wavefront&, const Operand& out);
void reference_wavefront_backward(const Wavefront&, const WavefrontGradients&);

}  // namespace pentad::scan
