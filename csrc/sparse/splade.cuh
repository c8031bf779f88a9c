// SPDX-License-Identifier: Apache-2.0
// What the kernels of the SPLADE head share: its arguments on a device and the activation.
#pragma once
#include "sparse/splade_cuda.h"
#include "sparse/splade_tile.cuh"

namespace pentad::sparse::cuda {

// A mask, 1 everywhere where there is none.
struct TokenMask {
  const void* data;
  DType dtype;
  int64_t strides[2];

  static TokenMask of(const SpladeHead& head) {
    if (!head.mask) return {};
    return {head.mask->data, head.mask->dtype, {head.mask->strides[0], head.mask->strides[1]}};
  }
  // 0 or 1 as the mask says, -1 for any other number.
  __device__ int at(int64_t b, int64_t l) const {
    if (!data) return 1;
    const int64_t i = b * strides[0] + l * strides[1];
    switch (dtype) {
      case DType::i16: return of_integer(static_cast<const int16_t*>(data)[i]);
      case DType::i32: return of_integer(static_cast<const int32_t*>(data)[i]);
      case DType::i64: return of_integer(static_cast<const int64_t*>(data)[i]);
      case DType::f16: return of_bits(static_cast<const uint16_t*>(data)[i], 0x3c00, 0x7fff);
      case DType::bf16: return of_bits(static_cast<const uint16_t*>(data)[i], 0x3f80, 0x7fff);
      case DType::f32: return of_float(static_cast<const float*>(data)[i]);
      case DType::f64: return of_float(static_cast<const double*>(data)[i]);
      default: return of_integer(static_cast<const int8_t*>(data)[i]);
    }
  }

 private:
  __device__ static int of_integer(int64_t x) { return x == 0 ? 0 : x == 1 ? 1 : -1; }
  __device__ static int of_float(double x) { return x == 0 ? 0 : x == 1 ? 1 : -1; }
  __device__ static int of_bits(int bits, int one, int magnitude) {
    return (bits & magnitude) == 0 ? 0 : bits == one ? 1 : -1;
  }
};

// Rows of hidden (B, L, H) and weight (V, H), and the bias.
template <class T>
struct HeadArrays {
  Operand<T> hidden, weight;
  int64_t batch_stride, token_stride, word_stride, bias_stride;
  const T* bias;
  int64_t batch, length, vocabulary;
  SpladeActivation activation;

  explicit HeadArrays(const SpladeHead& head)
      : hidden{static_cast<const T*>(head.hidden.data), head.hidden.strides[2], head.dim(), false},
        weight{static_cast<const T*>(head.weight.data), head.weight.strides[1], head.dim(), false},
        batch_stride(head.hidden.strides[0]),
        token_stride(head.hidden.strides[1]),
        word_stride(head.weight.strides[0]),
        bias_stride(head.bias ? head.bias->strides[0] : 0),
        bias(head.bias ? static_cast<const T*>(head.bias->data) : nullptr),
        batch(head.batch()),
        length(head.length()),
        vocabulary(head.vocabulary()),
        activation(head.activation) {
    hidden.aligned = is_aligned<T>(hidden.data, hidden.col_stride, {batch_stride, token_stride});
    weight.aligned = is_aligned<T>(weight.data, weight.col_stride, {word_stride});
  }
  __device__ int64_t token(int64_t b, int64_t l) const {
    return b * batch_stride + l * token_stride;
  }
  __device__ int64_t word(int64_t v) const { return v < vocabulary ? v * word_stride : kNowhere; }
  __device__ float bias_of(int64_t v) const {
    return bias && v < vocabulary ? widened(bias[v * bias_stride]) : 0.0f;
  }
};

// NaN stays.
__device__ inline float act(float x, SpladeActivation activation) {
  const float once = log1pf(x <= 0 ? 0.0f : x);
  return activation == SpladeActivation::log1p_relu ? once : log1pf(once);
}
// Of a positive number.
__device__ inline float derivative(float x, SpladeActivation activation) {
  const float divisor = 1 + x;
  return 1 / (activation == SpladeActivation::log1p_relu ? divisor : divisor * (1 + log1pf(x)));
}

// Calls `call` with a number of the type that a kernel takes for this dtype.
template <class Call>
void with_type(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::f16: return call(__half{});
    case DType::bf16: return call(__nv_bfloat16{});
    default: return call(float{});
  }
}

}  // namespace pentad::sparse::cuda
