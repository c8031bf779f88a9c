// SPDX-License-Identifier: Apache-2.0
// The SPLADE head: the projection of token states onto a vocabulary, a saturating activation, and
// pooling over the tokens of a sequence (Formal et al. 2021, "SPLADE", equation 3, and "SPLADE v2",
// equation 6).
//
//   hidden  (B, L, H)  float16, bfloat16, float32 or float64, of any strides
//   weight  (V, H)     the same dtype
//   bias    (V) or absent; mask (B, L) of 0 and 1 or absent, which is 1
//
//   logit(b, l, v) = sum_h hidden(b, l, h) weight(v, h) + bias(v)
//   act(x)         = log(1 + max(x, 0)), or log(1 + log(1 + max(x, 0)))
//   max            out(b, v) = max over l with mask(b, l) = 1 of act(logit(b, l, v))
//   sum            out(b, v) = sum over l with mask(b, l) = 1 of act(logit(b, l, v))
//
// A sequence without such a token gives 0, as the logits times the mask would. Sums of a logit are a
// float32 chain over h (multiply-adds fused where the level has them) in blocks of 512, the bias is
// added last; float64 ends in the definition. act and max commute, so the maximum is taken of the
// logits and act of the result.
//
// Gradients, with g that of out:
//   s(b, l, v)   = g(b, v) act'(logit(b, l, v)) where logit > 0, for max only at the first l that
//                  attains the maximum, else 0
//   d_hidden     = sum_v s(b, l, v) weight(v), d_weight = sum_(b, l) s(b, l, v) hidden(b, l),
//   d_bias(v)    = sum_(b, l) s(b, l, v)
// in rising v, or rising (b, l), whatever the threads. A NaN logit of a token gives NaN, in the
// gradient at the first token of the sequence.
//
// Error: that of the float32 chain, at most (H + 2) 2^-24 sum_h |hidden weight| for a logit, and
// about 2^-22 of the result for act.
#pragma once
#include <cstdint>
#include <optional>

#include "common/tensor_view.h"
#include "sparse/splade_kernels.h"

namespace pentad::sparse {

enum class SpladePooling : uint8_t { max, sum };

struct SpladeHead {
  TensorView hidden, weight;
  std::optional<TensorView> bias, mask;
  SpladePooling pooling = SpladePooling::max;
  SpladeActivation activation = SpladeActivation::log1p_relu;

  int64_t batch() const { return hidden.shape[0]; }
  int64_t length() const { return hidden.shape[1]; }
  int64_t dim() const { return hidden.shape[2]; }
  int64_t vocabulary() const { return weight.shape[0]; }
};

// All contiguous (B, V). top and place, for the gradient of max pooling, may be null: the largest
// logit where positive, else 0, float32 (float64 for float64), and its l, else -1.
struct SpladeOutputs {
  void* out;  // of the inputs' dtype
  void* top;
  int32_t* place;
};

// d_out (B, V) of any strides and of the inputs' dtype. The results are contiguous, of the inputs'
// dtype, and may be null. For max pooling, top and place are those of the forward pass.
struct SpladeGradients {
  TensorView d_out;
  const void* top;
  const int32_t* place;
  void *d_hidden, *d_weight, *d_bias;
};

// Throw std::invalid_argument for a mask that holds other than 0 and 1, or a place that is no l
// with mask 1; what is written is then undefined.
void splade_head(const SpladeHead& head, const SpladeOutputs& outputs);
void splade_head_backward(const SpladeHead& head, const SpladeGradients& gradients);

// The definitions, plain loops in double; float64 ends here.
void reference_splade_head(const SpladeHead& head, const SpladeOutputs& outputs);
void reference_splade_head_backward(const SpladeHead& head, const SpladeGradients& gradients);

// l of the tokens with mask 1, by sequence.
void splade_tokens(const SpladeHead& head, int64_t b, int32_t* tokens, int64_t* count);

// The k largest positive values of each row of x (rows, columns), NaN the largest, the smaller
// column first among equals; what is not kept becomes 0. dtype float32, float64 or a half.
void splade_keep(void* x, DType dtype, int64_t rows, int64_t columns, int64_t k);
// Compressed rows of what is not zero: first indptr (rows + 1), then indices and values of it.
void splade_count(const void* x, DType dtype, int64_t rows, int64_t columns, int64_t* indptr);
void splade_compress(const void* x, DType dtype, int64_t rows, int64_t columns,
                     const int64_t* indptr, int64_t* indices, void* values);

}  // namespace pentad::sparse
