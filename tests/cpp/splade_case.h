// SPDX-License-Identifier: Apache-2.0
// A SPLADE head of random numbers with its gradients, for the tests of its implementations.
#pragma once
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <random>
#include <vector>

#include "common/reals.h"
#include "sparse/splade.h"

namespace pentad::sparse {

inline std::mt19937 generator(1);

inline std::vector<char> reals(int64_t n, DType dtype, double scale) {
  std::normal_distribution<double> normal;
  std::vector<char> data(n * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) write_real(data.data(), dtype, i, scale * normal(generator));
  return data;
}

inline TensorView view(const void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = const_cast<void*>(data), view.dtype = dtype;
  for (int64_t n : shape) view.shape[view.rank++] = n;
  int64_t step = 1;
  for (int d = view.rank; d-- > 0; step *= view.shape[d]) view.strides[d] = step;
  return view;
}

struct Results {
  std::vector<std::vector<char>> arrays;  // out, d_hidden, d_weight, d_bias
  std::vector<float> top;
  std::vector<int32_t> place;
};

struct Case {
  int64_t b, length, dim, vocab;
  DType dtype;
  std::vector<char> hidden, weight, bias, d_out;
  std::vector<uint8_t> mask;
  SpladeHead head;

  Case(int64_t b, int64_t length, int64_t dim, int64_t vocab, DType dtype)
      : b(b),
        length(length),
        dim(dim),
        vocab(vocab),
        dtype(dtype),
        hidden(reals(b * length * dim, dtype, 1)),
        weight(reals(vocab * dim, dtype, 1 / std::sqrt(dim + 1.0))),
        bias(reals(vocab, dtype, 0.3)),
        d_out(reals(b * vocab, dtype, 1)),
        mask(b * length) {
    for (int64_t i = 0; i < b * length; ++i) mask[i] = i >= length && generator() % 3 != 0;
    head.hidden = view(hidden.data(), dtype, {b, length, dim});
    head.weight = view(weight.data(), dtype, {vocab, dim});
    head.bias = view(bias.data(), dtype, {vocab});
    head.mask = view(mask.data(), DType::u8, {b, length});
  }

  template <class Forward, class Backward>
  Results run(Forward forward, Backward backward, const Results* saved = nullptr) {
    Results r;
    for (int64_t n : {b * vocab, b * length * dim, vocab * dim, vocab})
      r.arrays.emplace_back(n * size_of(dtype), 7);
    r.top.assign(b * vocab, 7), r.place.assign(b * vocab, 7);
    forward(head, SpladeOutputs{r.arrays[0].data(), r.top.data(), r.place.data()});
    const Results& from = saved ? *saved : r;  // the same tokens where two are nearly equal
    backward(head, SpladeGradients{view(d_out.data(), dtype, {b, vocab}), from.top.data(),
                                   from.place.data(), r.arrays[1].data(), r.arrays[2].data(),
                                   r.arrays[3].data()});
    return r;
  }
};

inline double furthest(const std::vector<char>& a, const std::vector<char>& b, DType dtype) {
  double furthest = 0, largest = 1;
  for (size_t i = 0; i < a.size() / size_of(dtype); ++i) {
    const double x = read_real(a.data(), dtype, i), y = read_real(b.data(), dtype, i);
    furthest = std::max(furthest, std::abs(x - y)), largest = std::max(largest, std::abs(y));
  }
  return furthest / largest;
}

}  // namespace pentad::sparse
