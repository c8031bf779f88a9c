// SPDX-License-Identifier: Apache-2.0
// The inner kernels of the SPLADE head that exist once per instruction-set level
// (splade_simd.inc). splade.cc drives them: tiles, threads.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::sparse {

enum class SpladeActivation : uint8_t { log1p_relu, log1p_log1p_relu };

// Logits of `count` tokens and one panel of the vocabulary, whose columns follow each other.
struct SpladeTile {
  const float* tokens;  // [count][step]
  int64_t count, step, dim;
  const float* panel;  // [dim][width]
  const float* bias;   // [width]
  float* logits;       // [count][width]: scratch, without the bias
};

// The largest positive logit of each column so far, as its bits, with the number of its token
// (0: none is positive); and the largest bits of any logit, which are beyond those of -infinity
// where there was a NaN.
struct SpladeMaxJob {
  SpladeTile tile;
  int32_t first;      // number of the first token
  int32_t* top;       // [width]
  int32_t* place;     // [width]
  uint32_t* highest;  // [width]
};

// sums[width] += activation(logit) over the tokens, in order.
struct SpladeSumJob {
  SpladeTile tile;
  SpladeActivation activation;
  float* sums;
};

// tile.logits becomes d_out[width] * the derivative of the activation, d_bias[width] += its sums.
struct SpladeSlopeJob {
  SpladeTile tile;
  SpladeActivation activation;
  const float* d_out;
  float* d_bias;
};

// Entries [starts[v], starts[v + 1]) of column v: a row of floats and its factor.
struct SpladeEntries {
  const int64_t* starts;
  const int32_t* rows;
  const float* factors;
};

// out row v [from, from + count) = sum_e factor * rows[row of e][0, count), the groups of entries in
// order.
struct SpladeGatherJob {
  const SpladeEntries* groups;
  int64_t group_count;
  int64_t first, last;  // columns of the vocabulary
  const float* rows;    // [.][step]
  int64_t step;
  int64_t from, count;  // at most 64
  char* out;
  DType dtype;
  int64_t out_step;  // elements
};

// sums[row of e][0, count) += factor * weight row v [from, from + count), v rising.
struct SpladeScatterJob {
  SpladeEntries entries;
  int64_t columns;  // of the vocabulary
  const char* weight;
  DType dtype;
  int64_t row_stride, col_stride;  // elements
  float* sums;                     // [.][step]
  int64_t step;
  int64_t from, count;  // at most 64
};

struct SpladeKernels {
  int64_t width;  // columns of a panel
  // `count` elements to float32; of float32, times 1, to dtype.
  void (*widen)(const void* from, DType dtype, int64_t stride, int64_t count, float* out);
  void (*narrow)(const float* from, int64_t count, DType dtype, void* out);
  // Rows [count <= width][padded] to a panel [padded][width]; padded is a multiple of 16.
  void (*pack)(const float* rows, int64_t count, int64_t padded, const float* zeros, float* panel);
  void (*max)(const SpladeMaxJob&);
  void (*sum)(const SpladeSumJob&);
  void (*slope)(const SpladeSlopeJob&);
  void (*activate)(const float* logits, int64_t count, SpladeActivation, float* out);
  // out[width][padded] += transpose of slopes[count][width] times tokens[count][padded].
  void (*weight_product)(const float* slopes, int64_t count, const float* tokens, int64_t padded,
                         float* out);
  // out[count][padded] += slopes[count][width] times rows[width][padded].
  void (*token_product)(const float* slopes, int64_t count, const float* rows, int64_t padded,
                        float* out);
  void (*gather)(const SpladeGatherJob&);
  void (*scatter)(const SpladeScatterJob&);
};

}  // namespace pentad::sparse

// One table per level that is compiled in.
namespace pentad::v2 {
extern const sparse::SpladeKernels sparse_splade_kernels;
}
namespace pentad::v3 {
extern const sparse::SpladeKernels sparse_splade_kernels;
}
namespace pentad::v4 {
extern const sparse::SpladeKernels sparse_splade_kernels;
}
namespace pentad::v4x {
extern const sparse::SpladeKernels sparse_splade_kernels;
}
namespace pentad::neon {
extern const sparse::SpladeKernels sparse_splade_kernels;
}
