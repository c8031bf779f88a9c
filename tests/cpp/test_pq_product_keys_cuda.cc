// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of product-key memory, executed on the CPU lane by lane, against the definition
// over all pairs: the same selection, ties and NaN too, and gradients.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "orders.h"
#include "pq/product_keys_cuda.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937 random_bits(11);
const CudaStream stream;

// Memory of exactly this size, so that the sanitizer sees what goes past it.
template <class T>
std::vector<T> room(int64_t count) {
  std::vector<T> memory(count);
  memory.reserve(1);
  return memory;
}

std::vector<float> draw(int64_t count, bool ties) {
  std::normal_distribution<float> normal;
  auto data = room<float>(count);
  for (float& x : data) x = ties ? std::round(normal(random_bits)) : normal(random_bits);
  return data;
}

// Of row-major shape, in memory where the last dimension varies slowest if `turned`.
TensorView view(std::vector<float>& data, std::vector<int64_t> shape, bool turned = false) {
  TensorView view;
  view.data = data.data();
  view.dtype = DType::f32;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = 0; i < view.rank; ++i) {
    const int d = turned ? i : view.rank - 1 - i;
    view.shape[d] = shape[d];
    view.strides[d] = stride;
    stride *= shape[d];
  }
  return view;
}

void close(const std::vector<float>& got, const std::vector<float>& want, const char* what) {
  for (size_t i = 0; i < got.size(); ++i)
    CHECK(std::abs(got[i] - want[i]) <= 1e-4f * (1 + std::abs(want[i])), what, i, got[i], want[i]);
}

void memory(int64_t rows, int64_t heads, int64_t n, int64_t half, int64_t dv, int64_t k, bool ties,
            bool softmax, bool per_head, bool turned = false) {
  auto q = draw(rows * heads * 2 * half, ties), subkeys = draw(heads * 2 * n * half, ties);
  auto values = draw(n * n * dv, false);
  const ProductKeys in{view(q, {rows, heads, 2 * half}, turned),
                       view(subkeys, {heads, 2, n, half}, turned),
                       view(values, {n * n, dv}, turned),
                       k,
                       0.7,
                       softmax,
                       per_head};
  auto out = room<float>(in.groups() * dv), out_want = out;
  auto weights = room<float>(in.entries()), weights_want = weights;
  auto indices = room<int64_t>(in.entries()), indices_want = indices;
  auto scratch = room<char>(cuda::product_keys_scratch(rows, heads, n, k));
  cuda::product_keys(stream, in, {out.data(), indices.data(), weights.data()}, scratch.data());
  reference::product_keys(in, {out_want.data(), indices_want.data(), weights_want.data()});
  CHECK(indices == indices_want, rows, heads, n, k);
  close(weights, weights_want, "weights");
  close(out, out_want, "out");

  auto d_out = draw(in.groups() * dv, false), d_weights = draw(in.entries(), false);
  auto d_q = room<float>(q.size()), d_q_want = d_q;
  auto d_subkeys = room<float>(subkeys.size()), d_subkeys_want = d_subkeys;
  auto d_values = room<float>(values.size()), d_values_want = d_values;
  ProductKeysGrad grad{};
  grad.indices = indices.data(), grad.weights = weights.data();
  grad.d_out = view(d_out, {in.groups(), dv}, turned), grad.d_weights = d_weights.data();
  grad.d_q = d_q_want.data(), grad.d_subkeys = d_subkeys_want.data();
  grad.d_values = d_values_want.data();
  reference::product_keys_backward(in, grad);
  grad.d_q = d_q.data(), grad.d_subkeys = d_subkeys.data(), grad.d_values = d_values.data();
  auto space = room<char>(cuda::product_keys_backward_scratch(rows, heads, n, half, k, dv, n * n));
  cuda::product_keys_backward(stream, in, grad, nullptr, n * n, space.data());
  close(d_q, d_q_want, "d_q");
  close(d_subkeys, d_subkeys_want, "d_subkeys");
  close(d_values, d_values_want, "d_values");

  // Rows of values by places: every other one.
  auto places = room<int64_t>(in.entries());
  for (size_t i = 0; i < places.size(); ++i) places[i] = indices[i] % 2 ? -1 : indices[i] / 2;
  const int64_t count = (n * n + 1) / 2;
  auto some = room<float>(count * dv);
  grad.d_q = grad.d_subkeys = nullptr, grad.d_values = some.data();
  cuda::product_keys_backward(stream, in, grad, places.data(), count, space.data());
  auto want = some;
  for (int64_t i = 0; i < count * dv; ++i) want[i] = d_values[i / dv * 2 * dv + i % dv];
  close(some, want, "places");
}

}  // namespace

int main() {
  in_every_order([] {
    for (bool softmax : {true, false})
      for (bool ties : {true, false}) {
        memory(5, 2, 7, 3, 4, 5, ties, softmax, false);
        memory(3, 2, 6, 18, 3, 36, ties, softmax, true, true);
      }
    memory(2, 1, 300, 2, 1, 40, true, true, false);
    memory(1, 1, 40, 2, 2, 600, false, true, false);  // pairs beyond shared memory
    memory(70, 1, 3, 2, 33, 9, true, true, false);    // sums over chunks
    memory(0, 2, 3, 2, 3, 2, false, true, false);
    memory(3, 2, 3, 2, 0, 2, false, true, false);
  });
  return report();
}
