// SPDX-License-Identifier: Apache-2.0
// The SPLADE head as its definition says, in plain loops and double sums.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "common/reals.h"
#include "sparse/splade.h"

namespace pentad::sparse {
namespace {

double read_number(const TensorView& view, int64_t i) {
  switch (view.dtype) {
    case DType::u8:
    case DType::boolean: return static_cast<const uint8_t*>(view.data)[i];
    case DType::i8: return static_cast<const int8_t*>(view.data)[i];
    case DType::i16: return static_cast<const int16_t*>(view.data)[i];
    case DType::i32: return static_cast<const int32_t*>(view.data)[i];
    case DType::i64: return static_cast<double>(static_cast<const int64_t*>(view.data)[i]);
    default: return read_real(view.data, view.dtype, i);
  }
}

double logit(const SpladeHead& head, int64_t b, int64_t l, int64_t v) {
  const TensorView &x = head.hidden, &w = head.weight;
  double sum = 0;
  for (int64_t h = 0; h < head.dim(); ++h)
    sum += read_real(x.data, x.dtype, b * x.strides[0] + l * x.strides[1] + h * x.strides[2]) *
           read_real(w.data, w.dtype, v * w.strides[0] + h * w.strides[1]);
  return sum + (head.bias ? read_real(head.bias->data, head.bias->dtype, v * head.bias->strides[0])
                          : 0.0);
}

double act(double x, SpladeActivation activation) {
  const double once = std::log1p(x <= 0 ? 0.0 : x);
  return activation == SpladeActivation::log1p_relu ? once : std::log1p(once);
}

double derivative(double x, SpladeActivation activation) {
  const double once = 1 / (1 + x);
  return activation == SpladeActivation::log1p_relu ? once : once / (1 + std::log1p(x));
}

std::vector<int32_t> tokens_of(const SpladeHead& head, int64_t b) {
  std::vector<int32_t> tokens(head.length());
  int64_t count = 0;
  splade_tokens(head, b, tokens.data(), &count);
  tokens.resize(count);
  return tokens;
}

}  // namespace

void splade_tokens(const SpladeHead& head, int64_t b, int32_t* tokens, int64_t* count) {
  *count = 0;
  for (int64_t l = 0; l < head.length(); ++l) {
    double value = 1;
    if (head.mask)
      value = read_number(*head.mask, b * head.mask->strides[0] + l * head.mask->strides[1]);
    if (value == 1) tokens[(*count)++] = static_cast<int32_t>(l);
    else if (value != 0)
      throw std::invalid_argument("[sparse.splade_head] attention_mask holds " +
                                  std::to_string(value) + " at (" + std::to_string(b) + ", " +
                                  std::to_string(l) + "), expected 0 or 1");
  }
}

void reference_splade_head(const SpladeHead& head, const SpladeOutputs& outputs) {
  const int64_t columns = head.vocabulary();
  const DType wide = head.hidden.dtype == DType::f64 ? DType::f64 : DType::f32;
  for (int64_t b = 0; b < head.batch(); ++b) {
    const std::vector<int32_t> tokens = tokens_of(head, b);
    for (int64_t v = 0; v < columns; ++v) {
      double sum = 0, top = 0;
      int32_t place = -1;
      bool nan = false;
      for (int32_t l : tokens) {
        const double x = logit(head, b, l, v);
        sum += act(x, head.activation);
        nan |= x != x;
        if (x > top) top = x, place = l;
      }
      if (nan) top = std::numeric_limits<double>::quiet_NaN(), place = tokens[0];
      const int64_t i = b * columns + v;
      const bool max = head.pooling == SpladePooling::max;
      write_real(outputs.out, head.hidden.dtype, i, max ? act(top, head.activation) : sum);
      if (max && outputs.top) write_real(outputs.top, wide, i, top);
      if (max && outputs.place) outputs.place[i] = place;
    }
  }
}

void reference_splade_head_backward(const SpladeHead& head, const SpladeGradients& gradients) {
  const TensorView &x = head.hidden, &w = head.weight, &g = gradients.d_out;
  const int64_t dim = head.dim(), columns = head.vocabulary(), length = head.length();
  const DType dtype = x.dtype, wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  std::vector<double> d_hidden(head.batch() * length * dim), d_weight(columns * dim),
      d_bias(columns);
  const auto add = [&](int64_t b, int64_t l, int64_t v, double slope) {
    for (int64_t h = 0; h < dim; ++h) {
      d_hidden[(b * length + l) * dim + h] +=
          slope * read_real(w.data, w.dtype, v * w.strides[0] + h * w.strides[1]);
      d_weight[v * dim + h] +=
          slope * read_real(x.data, dtype, b * x.strides[0] + l * x.strides[1] + h * x.strides[2]);
    }
    d_bias[v] += slope;
  };
  for (int64_t b = 0; b < head.batch(); ++b) {
    const std::vector<int32_t> tokens = tokens_of(head, b);
    for (int64_t v = 0; v < columns; ++v) {
      const double given = read_real(g.data, g.dtype, b * g.strides[0] + v * g.strides[1]);
      if (given == 0) continue;
      if (head.pooling == SpladePooling::max) {
        const int32_t l = gradients.place[b * columns + v];
        if (l == -1) continue;
        if (!std::binary_search(tokens.begin(), tokens.end(), l))
          throw std::invalid_argument("[sparse.splade_head] place is no token with mask 1");
        const double top = read_real(gradients.top, wide, b * columns + v);
        add(b, l, v, given * derivative(top, head.activation));
      } else {
        for (int32_t l : tokens) {
          const double at = logit(head, b, l, v);
          if (!(at <= 0)) add(b, l, v, given * derivative(at, head.activation));
        }
      }
    }
  }
  const auto write = [&](const std::vector<double>& from, void* to) {
    if (to)
      for (size_t i = 0; i < from.size(); ++i)
        write_real(to, dtype, static_cast<int64_t>(i), from[i]);
  };
  write(d_hidden, gradients.d_hidden);
  write(d_weight, gradients.d_weight);
  write(d_bias, gradients.d_bias);
}

}  // namespace pentad::sparse
