// SPDX-License-Identifier: Apache-2.0
// The inner kernels that exist once per instruction-set level (attention_*_simd.inc), as plain
// structs and function pointers. attention_forward.cc and attention_backward.cc drive them: they cut
// the work into blocks of queries and tiles of keys, and say which tiles a block meets.
//
// Packed operands consist of 32-bit units: an f32, or two bf16 that follow each other along the
// summed dimension (where the level multiplies bf16). D' = units(D), w = vector lanes:
//   "lanes" form   [tile][D'][64]             one tile: 64 rows transposed, zeros past the end
//   "rows" form    [rows][D']                 rows as they are, for the broadcast side of a product
//   "pairs" form   [units(rows)][pad(D, w)]   rows, or pairs of rows interleaved, zeros past the end
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::attention {

constexpr int kTile = 64;  // keys per tile
constexpr int kQueryBlock =
    96;                      // most queries per block: their scores, 24 KB, and K's tile fit L1/L2
constexpr int kFewRows = 4;  // query rows that share a pass over the keys when there are few
// Scores are kept in units of log2.
constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;
constexpr int kPeakSums = 12;   // enough to hide latency, few enough for 16 registers
constexpr int kMaxUnits = 512;  // of a row

// Row r of `count` rows: `dim` elements from base[r] or first + r * row_stride, element_stride apart.
struct Rows {
  const void* first;
  const void* const* each;  // null: strided
  DType dtype;
  int64_t row_stride, element_stride;
  int64_t count, dim;
};

// How products become scores, and which keys a query sees: one (batch, query head).
struct Rule {
  float scale, softcap;  // softcap 0: none
  bool plain;            // nothing but a positive scale
  const void* bias;      // of query 0 and key 0 of the sequence, or null
  DType bias_dtype;
  int64_t bias_q, bias_k;
  const float* key_bias;  // of key 0
  int64_t key_bias_k;
  bool alibi, has_sink;
  float slope, sink;
  uint64_t drop_below;  // dropout * 2^32; 0: none
  float keep_scale;     // 1 / (1 - dropout)
  uint64_t seed;
  uint32_t stream;  // batch * Hq + head
  int64_t offset, left, right;
};

// The part [begin, end) of a tile of keys that a block of queries meets.
struct Span {
  int64_t tile;
  int begin, end;
  bool window;             // some pairs lie outside the window
  const uint8_t* partial;  // (block's first query, key `begin`), or null
  int64_t partial_step;
};

struct ForwardJob {
  const Rule* rule;
  Rows q;         // the block's rows
  int64_t first;  // position of the first in its sequence
  int64_t value_dim;
  const float* k;  // lanes form
  const float* v;  // pairs form
  const Span* spans;
  int64_t span_count;
  float* scratch;  // forward_scratch floats, 64-byte aligned
  void* out;       // of the block's first row
  int64_t out_row, out_element;
  double* lse;  // [rows]
};

// lse in units of log2, in two floats: recomputed probabilities then err by the exponential's
// argument alone, not by the rounding of lse (up to 1e-6 of every p of a row).
struct LogSum {
  float high, low;
};

// Sums of probabilities over the block's queries, added to mass[key]; or, with `weights`, the sums
// over keys of p * weights[key], to row_sums.
struct MassJob {
  const Rule* rule;
  Rows q;
  int64_t first;
  const float* k;
  const Span* spans;
  int64_t span_count;
  float* scratch;
  const LogSum* lse;  // [rows]
  float* mass;
  const float* weights;
  float* row_sums;
};

// One tile of keys against a block of queries of one head: adds to dk, dv [64][pad(dim)] and to dq.
struct BackwardJob {
  const Rule* rule;
  int64_t dim, value_dim;
  int64_t first, rows;         // queries; bf16: from an even position on, pairs
  int64_t row_begin, row_end;  // those that take part (span.partial begins at row_begin)
  const float* q_rows;         // the block's first row, `q_step` floats to the next
  const float* do_rows;
  int64_t q_step, do_step;
  const float* q_pairs;  // pairs form, likewise
  const float* do_pairs;
  const float* k_lanes;  // of the tile
  const float* k_pairs;
  const float* v_lanes;
  const Span* span;
  const LogSum* lse;           // of the block's rows, -inf where a row sees nothing
  const float* delta;          // likewise
  const float* mass_gradient;  // of the tile's first key, or null
  float* dq;                   // [rows][pad(dim)], added to
  float* dk;                   // [64][pad(dim)], of the unscaled products
  float* dv;                   // [64][pad(value_dim)]
  float* dbias;                // (block's first query, tile's first key), added to; or null
  int64_t dbias_q, dbias_k;
  float* dkey_bias;  // [64], added to; or null
  float* scratch;
};

// A few query rows (of any heads of one KV head) against keys [begin, end) of a tile: one step of
// the online softmax.
struct FewJob {
  const Rule* const* rules;  // per row
  const int64_t* positions;  // per row: the query's position
  int rows;                  // <= kFewRows
  const float* q;            // rows form [rows][units]
  int64_t tile;
  int64_t dim, value_dim;
  DType dtype;
  const void* const* k_rows;  // [kTile] pointers to rows of unit element stride
  const void* const* v_rows;
  int64_t begin, end;
  bool fetch;                      // whether to prefetch the values
  const void* const* next_k_rows;  // [next_count], to prefetch
  int64_t next_count;
  float* m;  // [rows], running maximum in units of log2
  float* l;  // [rows], running sums
  float* o;  // [rows][value_dim padded to 64]
};

struct Kernels {
  int lanes;      // floats per vector
  bool dot_bf16;  // bf16 is multiplied as it is; otherwise it becomes f32
  // `bf16` (here and below) chooses the units: pairs of bf16, only where dot_bf16.
  void (*pack_lanes)(const Rows&, bool bf16, float* out);  // count <= 64: one tile
  void (*pack_rows)(const Rows&, bool bf16, float* out);
  void (*pack_pairs)(const Rows&, bool bf16, float* out);
  // f32 rows [count][step] times `factor` to rows of another dtype.
  void (*write_rows)(const float* rows, int64_t step, float factor, int64_t count, int64_t dim,
                     DType dtype, void* out, int64_t out_row, int64_t out_element);
  // sum_d a[r][d] b[r][d].
  void (*row_dots)(const Rows& a, const Rows& b, float* out);
  void (*forward[2])(const ForwardJob&);  // [bf16]
  void (*mass[2])(const MassJob&);
  void (*backward[2])(const BackwardJob&);
  void (*few[2])(const FewJob&);
  // `rounds` of kPeakSums independent multiply-adds of full vectors: the peak, for benchmarks.
  void (*multiply_adds)(int64_t rounds, bool bf16);
};

// Floats of scratch that a job of these sizes needs.
static constexpr int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static constexpr int64_t forward_scratch(int64_t dim, int64_t value_dim) {
  return kQueryBlock * (padded(dim, 16) + padded(value_dim, 16) + 2 * kTile + 16 + 2);
}
static constexpr int64_t backward_scratch() { return kTile * kTile * 5; }

}  // namespace pentad::attention

// One table per level that is compiled in.
namespace pentad::v2 {
extern const attention::Kernels attention_kernels;
}
namespace pentad::v3 {
extern const attention::Kernels attention_kernels;
}
namespace pentad::v4 {
extern const attention::Kernels attention_kernels;
}
namespace pentad::v4x {
extern const attention::Kernels attention_kernels;
}
namespace pentad::neon {
extern const attention::Kernels attention_kernels;
}
