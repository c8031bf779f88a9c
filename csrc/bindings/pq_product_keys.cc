// SPDX-License-Identifier: Apache-2.0
// Checks arguments of product-key memory and hands views to the kernels. Everything that could make
// a kernel read or write out of bounds is refused here, whoever calls.
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "pq/product_keys.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace pq;
using Optional = std::optional<TensorView>;

constexpr const char* kOp = "pq.product_key_lookup";
// Beyond, sizes of scratch memory might overflow (arrays of stride 0 may have any shape).
constexpr int64_t kMostHeads = 1 << 16, kMostColumns = 1 << 20;

ProductKeys arguments(const TensorView& q, const TensorView& subkeys, const TensorView& values,
                      int64_t k, double scale, bool softmax, bool per_head) {
  const std::initializer_list<DType> floats = {DType::f32, DType::f16, DType::bf16, DType::f64};
  expect(q, kOp, "q", floats, 3);
  expect(subkeys, kOp, "subkeys", floats, 4);
  expect(values, kOp, "values", floats, 2);
  const bool wide = q.dtype == DType::f64;
  if ((subkeys.dtype == DType::f64) != wide || (values.dtype == DType::f64) != wide)
    bad_value(kOp, "float64 goes with float64 alone");
  const int64_t heads = subkeys.shape[0], n = subkeys.shape[2], half = subkeys.shape[3];
  if (heads < 1 || subkeys.shape[1] != 2 || n < 1 || n > kMostSubkeys || half < 1)
    bad_value(kOp, "subkeys have shape " + shape_text(subkeys) +
                       ", expected (heads, 2, n_keys, half) with 1 to " +
                       std::to_string(kMostSubkeys) + " keys");
  if (heads > kMostHeads || half > kMostColumns || values.shape[1] > kMostColumns)
    bad_value(kOp, "subkeys have shape " + shape_text(subkeys) + " and values " +
                       shape_text(values) + ", expected at most " + std::to_string(kMostHeads) +
                       " heads and rows of " + std::to_string(kMostColumns) + " numbers");
  if (q.shape[1] != heads || q.shape[2] != 2 * half)
    bad_value(kOp, "q has shape " + shape_text(q) + ", expected (rows, " + std::to_string(heads) +
                       ", " + std::to_string(2 * half) + ")");
  if (values.shape[0] != n * n)
    bad_value(kOp, "values have " + std::to_string(values.shape[0]) + " rows, expected " +
                       std::to_string(n * n) + ", the square of " + std::to_string(n) + " keys");
  if (k < 1 || k > n * n)
    bad_value(kOp, "k is " + std::to_string(k) + ", expected 1 to " + std::to_string(n * n) +
                       ", the number of values");
  if (!std::isfinite(scale) || scale <= 0) bad_value(kOp, "scale is not a positive number");
  const int64_t most = std::numeric_limits<int32_t>::max();  // of places that are counted
  if (k > most / heads || (q.shape[0] && q.shape[0] > most / (heads * k)))
    bad_value(kOp, "rows * heads * k is more than " + std::to_string(most));
  return {q, subkeys, values, k, scale, softmax, per_head};
}

// A copy of contiguous row numbers, all in [0, limit): the array may change under a running kernel.
std::vector<int64_t> rows_below(const TensorView& view, int64_t count, int64_t limit,
                                const char* op) {
  const auto* data = static_cast<const int64_t*>(view.data);
  std::vector<int64_t> copy(data, data + count);
  for (const int64_t row : copy)
    if (row < 0 || row >= limit)
      bad_value(op, "indices hold " + std::to_string(row) + ", expected 0 to " +
                        std::to_string(limit - 1));
  return copy;
}

DType weight_type(const ProductKeys& in) { return in.wide() ? DType::f64 : DType::f32; }

void py_forward(const TensorView& q, const TensorView& subkeys, const TensorView& values, int64_t k,
                double scale, bool softmax, bool per_head, const TensorView& out,
                const TensorView& indices, const TensorView& weights) {
  const ProductKeys in = arguments(q, subkeys, values, k, scale, softmax, per_head);
  if (per_head) expect_output(out, kOp, "out", values.dtype, {in.rows(), in.heads(), in.dv()});
  else expect_output(out, kOp, "out", values.dtype, {in.rows(), in.dv()});
  expect_output(indices, kOp, "indices", DType::i64, {in.rows(), in.heads(), k});
  expect_output(weights, kOp, "weights", weight_type(in), {in.rows(), in.heads(), k});
  Writes writes(kOp);
  writes.input("q", q);
  writes.input("subkeys", subkeys);
  writes.input("values", values);
  writes.output("out", out);
  writes.output("indices", indices);
  writes.output("weights", weights);
  writes.finish();
  product_keys(in, {out.data, static_cast<int64_t*>(indices.data), weights.data});
}

// The data of an array of this shape, contiguous.
void* contiguous(const Optional& view, const char* name, DType dtype,
                 std::initializer_list<int64_t> shape) {
  if (!view) return nullptr;
  expect_output(*view, kOp, name, dtype, shape);
  return view->data;
}

void py_backward(const TensorView& q, const TensorView& subkeys, const TensorView& values,
                 double scale, bool softmax, bool per_head, const TensorView& indices,
                 const TensorView& weights, const Optional& d_out, const Optional& d_weights,
                 const Optional& d_q, const Optional& d_subkeys, const Optional& d_values,
                 const Optional& touched) {
  const int64_t k = indices.rank == 3 ? indices.shape[2] : 0;
  const ProductKeys in = arguments(q, subkeys, values, k, scale, softmax, per_head);
  const int64_t rows = in.rows(), heads = in.heads(), n = in.keys(), dv = in.dv();
  // What may be read-only is checked by hand.
  const auto expect_input = [&](const TensorView& view, const char* name, DType dtype) {
    expect(view, kOp, name, {dtype}, 3);
    if (view.shape[0] != rows || view.shape[1] != heads || view.shape[2] != k ||
        !is_contiguous(view))
      bad_value(kOp, std::string(name) + " has shape " + shape_text(view) +
                         ", expected the contiguous " + shape_text(indices));
  };
  expect_input(indices, "indices", DType::i64);
  expect_input(weights, "weights", weight_type(in));
  ProductKeysGrad grad{};
  const std::vector<int64_t> selected = rows_below(indices, in.entries(), n * n, kOp);
  grad.indices = selected.data();
  grad.weights = weights.data;
  if (d_weights) {
    expect_input(*d_weights, "d_weights", weight_type(in));
    grad.d_weights = d_weights->data;
  }
  if (d_out) {
    expect(*d_out, kOp, "d_out", {DType::f32, DType::f16, DType::bf16, DType::f64}, 2);
    if (d_out->shape[0] != in.groups() || d_out->shape[1] != dv ||
        (d_out->dtype == DType::f64) != in.wide())
      bad_value(kOp, "d_out has shape " + shape_text(*d_out) + ", expected (" +
                         std::to_string(in.groups()) + ", " + std::to_string(dv) + ")");
    grad.d_out = *d_out;
  }
  grad.d_q = contiguous(d_q, "d_q", q.dtype, {rows, heads, 2 * in.half()});
  grad.d_subkeys = contiguous(d_subkeys, "d_subkeys", subkeys.dtype, {heads, 2, n, in.half()});
  int64_t value_rows = n * n;
  if (touched) {
    value_rows = count_distinct(grad.indices, in.entries(), n * n);
    if (!d_values) bad_value(kOp, "touched goes with d_values");
    grad.touched = static_cast<int64_t*>(contiguous(touched, "touched", DType::i64, {value_rows}));
    static int64_t nothing;
    if (!grad.touched) grad.touched = &nothing;  // no row: an empty array may have no address
  }
  grad.d_values = contiguous(d_values, "d_values", values.dtype, {value_rows, dv});
  Writes writes(kOp);
  writes.input("q", q);
  writes.input("subkeys", subkeys);
  writes.input("values", values);
  writes.input("weights", weights);
  writes.input("d_out", d_out);
  writes.input("d_weights", d_weights);
  if (d_q) writes.output("d_q", *d_q);
  if (d_subkeys) writes.output("d_subkeys", *d_subkeys);
  if (d_values) writes.output("d_values", *d_values);
  if (touched) writes.output("touched", *touched);
  writes.finish();
  product_keys_backward(in, grad);
}

int64_t py_distinct(const TensorView& indices, int64_t limit) {
  constexpr const char* op = "pq.count_distinct";
  expect(indices, op, "indices", {DType::i64}, -1);
  if (!is_contiguous(indices)) bad_value(op, "indices are not contiguous");
  if (limit < 0) bad_value(op, "limit is " + std::to_string(limit));
  int64_t count = 1;
  for (int d = 0; d < indices.rank; ++d) count *= indices.shape[d];
  return count_distinct(rows_below(indices, count, limit, op).data(), count, limit);
}

}  // namespace

void bind_pq_product_keys(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.attr("pq_most_subkeys") = kMostSubkeys;
  m.def("pq_product_keys", &py_forward, release);
  m.def("pq_product_keys_backward", &py_backward, release);
  m.def("pq_count_distinct", &py_distinct, release);
}

}  // namespace pentad
