// SPDX-License-Identifier: Apache-2.0
// Linear recurrences over time: the selective scan of Mamba (Gu & Dao, arXiv 2312.00752, section 3),
// elementwise recurrences, the causal depthwise convolution before them, and their one-token steps.
//
// Every array is given by strides that count elements and may be zero or negative. Complex numbers
// are pairs of reals ("parts": real, imaginary) along a last dimension; a gradient of a complex
// number is the pair of the derivatives by its parts, which is torch's convention. Sequences are
// the batch, or with `begin` the pieces [begin[s], begin[s + 1]) of the only batch row. `reverse`
// runs each sequence from its last step to its first; "before" and "after" then mean that order.
//
// Results have the same bits for any number of threads. f64 arrays take the reference's path.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"
#include "scan/scan_kernels.h"

namespace pentad::scan {

// Element (i, j, ...) at data + i * stride[0] + j * stride[1] + ...
struct Operand {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  int64_t stride[5] = {};
};

// --- Selective scan -------------------------------------------------------------------------------
//
//   x_t  = delta_t + delta_bias                       per channel d, fp32
//   dt_t = softplus(x_t) = log(1 + exp(x_t)), or x_t above 20; without `softplus` dt_t = x_t
//   h_t  = exp(dt_t A) h_{t-1} + dt_t u_t B_t          per channel d and state n
//   y_t  = sum_n C_t h_t + D u_t                       complex: 2 Re(C_t h_t) in place of C_t h_t
//   out  = y_t silu(z_t), or y_t without z
//
// Backward, with g_t the gradient of h_t and y'_t that of y_t (z: dz = dout y silu'(z)):
//
//   g_t    = y'_t C_t + exp(dt_{t+1} A) g_{t+1}        complex: 2 y'_t conj(C_t), conj of the decay
//   dC_t   = sum_d y'_t h_t          dB_t = sum_d dt_t u_t g_t        (complex: conj, twice as above)
//   w_t    = g_t exp(dt_t A) h_{t-1}                   dA = sum_t dt_t w_t
//   ddt_t  = u_t sum_n g_t B_t + sum_n A w_t           ddelta_t = ddt_t sigmoid(x_t)
//   du_t   = dt_t sum_n g_t B_t + D y'_t
//
// Decays are never divided: w takes h_{t-1} as it is, so decays of exactly 0 are exact.
// Error budget: everything is fp32 between the reading of u, delta, z, B, C and the rounding of
// out; exp is right to 2e-7, relative to the rounded product dt A.
struct SelectiveScan {
  int64_t batch = 0, dim = 0, length = 0, states = 0, groups = 1;
  bool complex = false, softplus = false, reverse = false;
  Operand u, delta, z;      // (b, d, t): f32, bf16, f16 or f64, all the same; z may be absent
  Operand a;                // (d, n, part): f32, or f64 beside f64
  bool constant_b = false;  // b is (d, n, part), f32 (f64); else (b, g, n, t, part), dtype of u.
  bool constant_c = false;  // Channel d reads group d / (dim / groups).
  Operand b, c;
  Operand d, delta_bias;       // (d): f32 (f64); may be absent
  Operand initial;             // (sequence, d, n, part): f32 (f64); absent: zeros
  std::vector<int64_t> begin;  // [sequences + 1], or empty

  int64_t parts() const { return complex ? 2 : 1; }
  int64_t sequences() const { return begin.empty() ? batch : int64_t(begin.size()) - 1; }
};

// States before every kChunk-th step, f32 [chunk][n][part][d]: chunk c of sequence s of a batch is
// s * ceil(length / kChunk) + c, and begin[s] / kChunk + s + c with `begin`.
static inline int64_t stored_chunks(int64_t batch, int64_t length, bool packed, int64_t sequences) {
  if (packed) return length / kChunk + sequences;
  return batch * ((length + kChunk - 1) / kChunk);
}

// out: (b, d, t), dtype of u. last: (sequence, d, n, part), f32 (f64), or absent. stored: floats
// [stored_chunks][n][part][d], or null (and null with f64).
void selective_scan_forward(const SelectiveScan&, const Operand& out, const Operand& last,
                            float* stored);

// d_out, d_last: given (either may be absent: zero). du, ddelta, dz: dtype of u. da, dd, ddelta_bias,
// dinitial and db, dc: f32 (f64) with the indices of their inputs. Any but du may be absent. All are
// overwritten; none may overlap.
struct SelectiveScanGradients {
  Operand d_out, d_last;
  const float* stored = nullptr;
  Operand du, ddelta, da, db, dc, dd, dz, ddelta_bias, dinitial;
};
void selective_scan_backward(const SelectiveScan&, const SelectiveScanGradients&);

// One token on a cache, in place: state (row, h, p, n) <- exp(dt A) state + dt x B, then
// out = C . state + D x, times silu(z). x, dt, z, out (b, h, p): f32, bf16, f16 or f64, all the same;
// a (h, p, n), d and dt_bias (h, p): f32 (f64); b, c (b, g, n): dtype of x; state: f32, bf16, f16
// (f64), rounded when stored but not before out is taken. Sequence b has the state of row
// rows[b] (empty: b); a negative row is padding: its output is 0.
struct StateUpdate {
  int64_t batch = 0, heads = 0, head_dim = 0, states = 0, groups = 1;
  bool softplus = false;
  Operand state, x, dt, a, b, c, d, z, dt_bias, out;
  std::vector<int64_t> rows;
};
void state_update(const StateUpdate&);

// --- Projections of a step ------------------------------------------------------------------------
//
//   out_ro = sum_i x_ri weight_oi + bias_o
//
// for a few rows, where reading the weights is what costs time: each is read from memory once. Sums
// in fp32, 4 * lanes partial ones; a row's result does not depend on the rows beside it.
constexpr int64_t kMostRows = 8;
struct FewRowsLinear {
  int64_t rows = 1, inputs = 0, outputs = 0;  // 1 to kMostRows rows
  Operand x;                                  // (r, i): f32, bf16, f16 or f64
  Operand weight, bias;  // (o, i), stride[1] == 1, and (o): dtype of x; bias may be absent
};
void few_rows_linear(const FewRowsLinear&, const Operand& out);  // (r, o), dtype of x

// --- Elementwise recurrence -----------------------------------------------------------------------
//
//   h_t = a_t h_{t-1} + x_t, h_{-1} = h0 (absent: 0); with log_space a_t = exp(given_t)
//
//   g_t = dh_t + conj(a_{t+1}) g_{t+1}    dx = g    da_t = g_t conj(h_{t-1})    dh0 = conj(a_0) g_0
//   with log_space the gradient of the given logarithm is conj(a_t) da_t
//
// (LRU, GateLoop, HGRN, minGRU, RG-LRU.) Sums in fp32; h is rounded when stored, not in the carry.
struct Recurrence {
  int64_t outer = 0, inner = 0, length = 0;
  bool complex = false, log_space = false, reverse = false;
  Operand a, x;  // (o, i, t, part): f32, bf16, f16 or f64, both the same; strides may be 0
  Operand h0;    // (o, i, part), same dtype; may be absent

  int64_t parts() const { return complex ? 2 : 1; }
};
void recurrence_forward(const Recurrence&, const Operand& h);  // (o, i, t, part), dtype of x

// h: what the forward pass gave. da, dx, dh0: f32 (f64) or the dtype of x; any may be absent. With
// `sum_da` da has no time: it is summed over t (indices (o, i, -, part)), for a gate that is constant.
struct RecurrenceGradients {
  Operand h, dh, da, dx, dh0;
  bool sum_da = false;
};
void recurrence_backward(const Recurrence&, const RecurrenceGradients&);

// --- Causal convolution ---------------------------------------------------------------------------
//
//   p_t = bias + sum_{k < W} weight_k x_{t - (W - 1) + k}, per channel; out = p_t, or silu(p_t)
//
// x before a sequence's first step is `initial` (its last element is the step just before), or 0.
// With seq_idx (b, t), a tap counts only where seq_idx there equals seq_idx at t, and a step of
// negative seq_idx gives 0 (not with `initial`, `final` or `begin`). Sums in fp32.
constexpr int64_t kMaxWidth = 64;
struct CausalConv {
  int64_t batch = 0, dim = 0, length = 0, width = 1;
  bool silu = false;
  Operand x;             // (b, d, t): f32, bf16, f16 or f64
  Operand weight, bias;  // (d, k) and (d): f32, bf16 or f16 of their own (f64 beside f64)
  Operand initial;       // (sequence, d, width - 1), dtype of x; may be absent
  const int32_t* seq_idx = nullptr;
  int64_t seq_idx_stride[2] = {};
  std::vector<int64_t> begin;

  int64_t sequences() const { return begin.empty() ? batch : int64_t(begin.size()) - 1; }
};
// final: (sequence, d, width - 1), dtype of x, the inputs that a next piece needs; or absent.
void causal_conv_forward(const CausalConv&, const Operand& out, const Operand& final);

// d_out given; d_final may be absent. dx, dinitial: dtype of x; dweight, dbias: f32 (f64). Any
// output may be absent.
struct CausalConvGradients {
  Operand d_out, d_final, dx, dweight, dbias, dinitial;
};
void causal_conv_backward(const CausalConv&, const CausalConvGradients&);

// Further steps on a cache, in place. state (row, d, state_length >= width - 1), dtype of x, holds
// the latest inputs, the newest last; x (b, d, t) is convolved behind them and shifted in. With
// positions[b] (the number of tokens before) the cache is a ring: input i lies at i % state_length.
// rows as in StateUpdate: padding gives 0 and changes nothing.
struct ConvUpdate {
  CausalConv conv;  // without initial, seq_idx, begin
  Operand state, out;
  int64_t state_length = 0;
  std::vector<int64_t> rows, positions;
};
void causal_conv_update(const ConvUpdate&);

// --- The definitions: plain loops, double sums, any dtype, every option ---------------------------
void reference_selective_scan_forward(const SelectiveScan&, const Operand& out,
                                      const Operand& last);
void reference_selective_scan_backward(const SelectiveScan&, const SelectiveScanGradients&);
void reference_state_update(const StateUpdate&);
void reference_few_rows_linear(const FewRowsLinear&, const Operand& out);
void reference_recurrence_forward(const Recurrence&, const Operand& h);
void reference_recurrence_backward(const Recurrence&, const RecurrenceGradients&);
void reference_causal_conv_forward(const CausalConv&, const Operand& out, const Operand& final);
void reference_causal_conv_backward(const CausalConv&, const CausalConvGradients&);
void reference_causal_conv_update(const ConvUpdate&);

}  // namespace pentad::scan
