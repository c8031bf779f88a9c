// SPDX-License-Identifier: Apache-2.0
// Product-key memory at every level against the definition over all pairs: the same selection, and
// between levels the same bits.
#include "pq/product_keys.h"

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937 random_bits(11);

TensorView view(std::vector<float>& data, std::vector<int64_t> shape) {
  TensorView view;
  view.data = data.data();
  view.dtype = DType::f32;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = view.rank - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.strides[d] = stride;
    stride *= shape[d];
  }
  return view;
}

std::vector<float> draw(int64_t count, bool ties) {
  std::normal_distribution<float> normal;
  std::vector<float> data(count);
  for (float& x : data) x = ties ? std::round(normal(random_bits)) : normal(random_bits);
  data.reserve(1);  // an address even without elements
  return data;
}

struct Results {
  std::vector<float> out, weights;
  std::vector<int64_t> indices;

  explicit Results(const ProductKeys& in)
      : out(in.groups() * in.dv() + 1), weights(in.entries() + 1), indices(in.entries() + 1) {}
  ProductKeysOut pointers() { return {out.data(), indices.data(), weights.data()}; }
};

struct Gradients {
  std::vector<float> q, subkeys, values, rows;
  std::vector<int64_t> touched;

  Gradients(const ProductKeys& in, const Results& found)
      : q(in.entries() / in.k * 2 * in.half() + 1),
        subkeys(in.heads() * 2 * in.keys() * in.half() + 1),
        values(in.keys() * in.keys() * in.dv() + 1),
        touched(count_distinct(found.indices.data(), in.entries(), in.keys() * in.keys()) + 1) {
    rows.resize((touched.size() - 1) * in.dv() + 1);
  }
};

using Backward = void (*)(const ProductKeys&, const ProductKeysGrad&);

Gradients gradients(const ProductKeys& in, const Results& found, TensorView d_out,
                    const float* d_weights, Backward backward) {
  Gradients into(in, found);
  ProductKeysGrad grad{};
  grad.indices = found.indices.data();
  grad.weights = found.weights.data();
  grad.d_out = d_out;
  grad.d_weights = d_weights;
  grad.d_q = into.q.data();
  grad.d_subkeys = into.subkeys.data();
  grad.d_values = into.values.data();
  backward(in, grad);
  grad.d_q = grad.d_subkeys = nullptr;
  grad.d_values = into.rows.data();
  grad.touched = into.touched.data();
  backward(in, grad);
  return into;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

void close(const std::vector<float>& got, const std::vector<float>& want, const char* what) {
  CHECK(got.size() == want.size(), what);
  double largest = 1e-3;
  for (float x : want) largest = std::max(largest, std::abs(static_cast<double>(x)));
  // Float32 sums of up to some hundred terms, whose errors partly cancel.
  for (size_t i = 0; i < want.size(); ++i)
    CHECK(std::abs(got[i] - want[i]) <= 1e-5 * largest, name(isa()), what, i, got[i], want[i]);
}

void lookup(int64_t rows, int64_t heads, int64_t n, int64_t half, int64_t dv, int64_t k, bool ties,
            bool softmax, bool per_head) {
  std::vector<float> q = draw(rows * heads * 2 * half, ties);
  std::vector<float> subkeys = draw(heads * 2 * n * half, ties), values = draw(n * n * dv, false);
  const ProductKeys in{view(q, {rows, heads, 2 * half}),
                       view(subkeys, {heads, 2, n, half}),
                       view(values, {n * n, dv}),
                       k,
                       0.5,
                       softmax,
                       per_head};
  std::vector<float> d_out = draw(in.groups() * dv, false), d_weights = draw(in.entries(), false);
  const TensorView d_out_view = view(d_out, {in.groups(), dv});
  Results want(in);
  reference::product_keys(in, want.pointers());
  const Gradients plain =
      gradients(in, want, d_out_view, d_weights.data(), reference::product_keys_backward);
  Results first(in);
  Gradients first_gradients(in, want);
  for (const Isa level : isa_available()) {
    set_isa(level);
    Results got(in);
    product_keys(in, got.pointers());
    CHECK(same(got.indices, want.indices), name(level), rows, heads, n, half, dv, k, ties);
    CHECK(same(got.weights, want.weights), name(level), rows, heads, n, half, dv, k, ties);
    CHECK(same(got.out, want.out), name(level), rows, heads, n, half, dv, k, ties);
    const Gradients grads = gradients(in, got, d_out_view, d_weights.data(), product_keys_backward);
    close(grads.q, plain.q, "d_q");
    close(grads.subkeys, plain.subkeys, "d_subkeys");
    close(grads.values, plain.values, "d_values");
    close(grads.rows, plain.rows, "rows of d_values");
    CHECK(same(grads.touched, plain.touched), name(level));
    if (level == isa_available().front()) {
      first_gradients = grads;
    } else {
      CHECK(same(grads.q, first_gradients.q), name(level));
      CHECK(same(grads.subkeys, first_gradients.subkeys), name(level));
      CHECK(same(grads.values, first_gradients.values), name(level));
      CHECK(same(grads.rows, first_gradients.rows), name(level));
    }
  }
}

}  // namespace

int main() {
  for (int threads : {1, 3}) {
    set_num_threads(threads);
    for (bool ties : {false, true})
      for (bool softmax : {true, false})
        for (bool per_head : {false, true}) {
          lookup(0, 1, 3, 2, 4, 2, ties, softmax, per_head);
          lookup(1, 1, 1, 1, 1, 1, ties, softmax, per_head);
          lookup(3, 2, 5, 3, 7, 25, ties, softmax, per_head);
          lookup(50, 3, 33, 17, 19, 32, ties, softmax, per_head);
          lookup(70, 2, 65, 70, 16, 5, ties, softmax, per_head);
          lookup(2, 1, 700, 2, 3, 640, ties, softmax, per_head);
        }
  }
  return report();
}
