// SPDX-License-Identifier: Apache-2.0
// Softmax attention, exact and in memory linear in the sequence length.
//
// For query i and key j of one sequence and query head h (which reads KV head h / (Hq / Hk)):
//
//   x_ij = scale * <q_i, k_j>                        fp32 sums (fp64 for fp64 arrays)
//   s_ij = cap(x_ij) + bias_ij + key_bias_j - slope * |i + offset - j|,  cap(x) = c tanh(x / c)
//   M    = the keys that i may see: offset + i - left <= j <= offset + i + right, the block mask
//          allows (i, j), and bias_ij is not `false` where bias is boolean
//   z_i  = sum_{j in M} exp(s_ij) + exp(sink)        lse_i = log z_i
//   p_ij = exp(s_ij) / z_i for j in M, else 0
//   o_i  = sum_j p_ij keep_ij v_j / (1 - dropout)    mass_j = sum_i p_ij (before dropout)
//
// offset = Sk - Sq: the last query sees the last key ("bottom right", flash-attention's rule); with
// top_left it is 0 (torch's rule). A row that sees no key gives o = 0, and lse = -inf (or the
// sink). A key outside M contributes nothing whatever it holds, NaN included; a NaN or infinity
// inside M gives what the formulas give.
//
// keep_ij is a bit of Philox-4x32-10 with key = seed and counter (j / 4, i, b * Hq + h, 0): its
// word j % 4 is kept where word >= dropout * 2^32. It depends on nothing else, so the backward pass
// and the reference draw the same bits.
//
// Backward, with do, dlse, dmass given (Rabe & Staats, arXiv 2112.05682; Dao et al., 2205.14135):
//
//   dv_j  = sum_i p_ij keep_ij / (1 - dropout) do_i
//   a_ij  = keep_ij / (1 - dropout) <do_i, v_j> + dmass_j
//   delta_i = <do_i, o_i> + sum_j p_ij dmass_j - dlse_i
//   ds_ij = p_ij (a_ij - delta_i)       dbias = ds, dkey_bias_j = sum_i ds_ij,
//   dsink = -sum_i exp(sink - lse_i) delta_i
//   dx_ij = ds_ij (1 - tanh(x_ij / c)^2) dq_i = scale sum_j dx_ij k_j, dk_j = scale sum_i dx_ij q_i
//
// Rows whose scores are all -inf (a bias may say so) count as rows that see no key.
//
// Error budget: products of bf16 pairs are exact and summed in fp32. Where the level multiplies
// bf16 pairs, p is rounded to bf16 (2^-9) before it meets bf16 values, and its exponential has a
// relative error of 7.5e-5, which lse and mass show; everywhere else exponentials are right to
// 7.5e-8 and everything is fp32. Results have the same bits for any number of threads. delta is
// taken from the rounded output, as flash-attention does, so where a gradient is exactly zero (a
// row of one key) roundings of <do, o> are left. Where there is a bias, softcap or ALiBi, finite
// scores beyond +-1e10 count as that (not in float64). A NaN beside +inf in one row gives
// lse = +inf; o and the gradients are NaN all the same.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace pentad::attention {

constexpr int64_t kMaxDim = 512;
constexpr int64_t kUnbounded = int64_t{1} << 40;  // of a window

// Element (b, h, s, d) at data + b * stride[0] + h * stride[1] + s * stride[2] + d * stride[3];
// strides count elements and may be zero or negative. Packed sequences: stride[0] is unused and s
// counts from the first token of all.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {};
};

// Which blocks of the score matrix may be touched. For the pair (mask batch, mask head), query
// block i: the key blocks cols[n], n in [row_ptr[i], row_ptr[i + 1]), ascending; kinds[n] is -1
// where all of the block is visible, else the number of the byte matrix [q_block][k_block] in
// `partial` that says which elements are. The same by columns: rows, row_kinds under col_ptr.
// Query and key positions count from the sequence's first.
struct BlockMask {
  int64_t q_block = 0, k_block = 0;
  int64_t q_blocks = 0, k_blocks = 0;
  int64_t batch = 1, heads = 1;      // each 1 or the problem's
  const int64_t* row_ptr = nullptr;  // [batch][heads][q_blocks + 1], into cols
  const int32_t* cols = nullptr;
  const int32_t* kinds = nullptr;
  const int64_t* col_ptr = nullptr;  // [batch][heads][k_blocks + 1], into rows
  const int32_t* rows = nullptr;
  const int32_t* row_kinds = nullptr;
  const uint8_t* partial = nullptr;
};

struct Problem {
  int64_t batch = 0, heads = 0, kv_heads = 0, dim = 0, value_dim = 0;
  int64_t max_q = 0, max_k = 0;  // Sq and Sk, or the longest of the packed sequences
  // All inputs have the dtype of q: f32, bf16, f16, or f64 (which takes the reference's path).
  Operand q, k, v;

  std::vector<int64_t> q_begin, k_begin;  // [batch + 1]: packed sequences; empty: dense
  std::vector<int64_t> k_length;          // [batch]: keys in use of each sequence; empty: all

  // Caches (k, v): sequence b lies in batch row cache_row[b] (empty: b) and begins at position
  // left_pad[b]; or, with pages, key j in row j % page_size of page
  // block_table[b * pages_per_sequence + j / page_size], where stride[0] steps over pages.
  std::vector<int64_t> cache_row, left_pad;
  std::vector<int32_t> block_table;
  int64_t page_size = 0, pages_per_sequence = 0;

  double scale = 1.0, softcap = 0.0;
  int64_t left = kUnbounded, right = kUnbounded;
  bool top_left = false;

  Operand bias;  // f32, bf16, f16 or boolean, f64 beside f64; data null: none
  // float32, or double where q is f64:
  const void* key_bias = nullptr;  // (b, h or KV head, j)
  int64_t key_bias_stride[3] = {};
  int64_t key_bias_heads = 0;   // Hq or Hk
  const void* alibi = nullptr;  // (b, h)
  int64_t alibi_stride[2] = {};
  const void* sink = nullptr;  // [Hq]
  double dropout = 0.0;
  uint64_t seed = 0;
  int64_t first_stream = 0;  // added to b * Hq + h: of a part of a larger problem
  const BlockMask* mask = nullptr;

  int64_t group() const { return heads / kv_heads; }
  int64_t q_len(int64_t b) const { return q_begin.empty() ? max_q : q_begin[b + 1] - q_begin[b]; }
  int64_t k_len(int64_t b) const {
    if (!k_length.empty()) return k_length[b];
    return k_begin.empty() ? max_k : k_begin[b + 1] - k_begin[b];
  }
  int64_t offset(int64_t b) const { return top_left ? 0 : k_len(b) - q_len(b); }
};

// out: dtype of q, (b, h, i, value_dim). lse: f32 or f64, stride[3] unused; may have no data. The
// backward pass recomputes p from it: an f64 lse spares p a relative error of up to 1e-6. key_mass:
// f32 (f64), (b, h, j), contiguous [batch][heads][max_k], or null; with packed sequences
// [heads][total keys]. It needs lse.
struct Outputs {
  Operand out, lse;
  void* key_mass = nullptr;
};
void forward(const Problem&, const Outputs&);

// What the backward pass reads and writes. Null data: not given, or not wanted. dq, dk, dv have q's
// dtype. dbias is f32 (f64) with the bias's broadcast, that is stride zero where its size is 1;
// the query dimension must not be broadcast. dkey_bias: f32 (f64), contiguous
// [batch][key_bias_heads][max_k] (packed: [key_bias_heads][total keys]). dsink: [Hq]. The buffers
// are overwritten.
struct Gradients {
  Operand out, lse, d_out, d_lse;    // given; d_lse has lse's layout
  const void* d_key_mass = nullptr;  // layout of key_mass
  Operand dq, dk, dv, dbias;
  void* dkey_bias = nullptr;
  void* dsink = nullptr;
};
void backward(const Problem&, const Gradients&);

// The definition: plain loops, double sums, any dtype, every option. What fp64 arrays get, and what
// the tests compare with.
void reference_forward(const Problem&, const Outputs&);
void reference_backward(const Problem&, const Gradients&);

// Philox-4x32-10 (Salmon et al., SC 2011).
struct Philox {
  uint32_t word[4];
};
Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3);

// k_new, v_new (b, h, t, d) to positions cache_length[b] + t of the caches described by `problem`
// (its cache_row, left_pad, block_table, k, v strides); same dtypes. The caller has checked the room.
void append(const Problem& problem, const std::vector<int64_t>& cache_length, const Operand& k_new,
            const Operand& v_new, int64_t new_tokens);

}  // namespace pentad::attention
