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
#include "pq/product_keys_cuda.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace pq;
using Optional = std::optional<TensorView>;

constexpr const char* kOp = "pq.product_key_lookup";
// Beyond, sizes of scratch memory might overflow (arrays of stride 0 may have any shape).
constexpr int64_t kMostHeads = 1 << 16, kMostColumns = 1 << 20;

ProductKeys arguments(const TensorView& q, const TensorView& subkeys, const TensorView& values,
                      int64_t k, double scale, bool softmax, bool per_head, Device on) {
  const std::initializer_list<DType> floats = {DType::f32, DType::f16, DType::bf16, DType::f64};
  expect(q, kOp, "q", floats, 3, on);
  expect(subkeys, kOp, "subkeys", floats, 4, on);
  expect(values, kOp, "values", floats, 2, on);
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

// Whether the CUDA kernels run.
bool runs(const ProductKeys& in, Device on, const Optional& scratch) {
  const bool fits = !in.wide() && in.k <= cuda::kMostEntries;
  return runs_cuda(on, fits, kOp, in.wide() ? "float64" : "k beyond 2048") &&
         (on.is_cuda() || scratch);
}

DType weight_type(const ProductKeys& in) { return in.wide() ? DType::f64 : DType::f32; }

void py_forward(const TensorView& q, const TensorView& subkeys, const TensorView& values, int64_t k,
                double scale, bool softmax, bool per_head, const TensorView& out,
                const TensorView& indices, const TensorView& weights, const Optional& scratch,
                uintptr_t stream) {
  const Device on = device_of(q);
  const ProductKeys in = arguments(q, subkeys, values, k, scale, softmax, per_head, on);
  if (per_head) expect_output(out, kOp, "out", values.dtype, {in.rows(), in.heads(), in.dv()}, on);
  else expect_output(out, kOp, "out", values.dtype, {in.rows(), in.dv()}, on);
  expect_output(indices, kOp, "indices", DType::i64, {in.rows(), in.heads(), k}, on);
  expect_output(weights, kOp, "weights", weight_type(in), {in.rows(), in.heads(), k}, on);
  Writes writes(kOp);
  writes.input("q", q);
  writes.input("subkeys", subkeys);
  writes.input("values", values);
  writes.output("out", out);
  writes.output("indices", indices);
  writes.output("weights", weights);
  writes.finish();
  const ProductKeysOut results{out.data, static_cast<int64_t*>(indices.data), weights.data};
  if (!runs(in, on, scratch)) return product_keys(in, results);
  const int64_t bytes = cuda::product_keys_scratch(in.rows(), in.heads(), in.keys(), k);
  cuda::product_keys(stream_of(on, stream), in, results, scratch_of(scratch, kOp, bytes, on));
}

// The data of an array of this shape, contiguous.
void* contiguous(const Optional& view, const char* name, DType dtype,
                 std::initializer_list<int64_t> shape, Device on) {
  if (!view) return nullptr;
  expect_output(*view, kOp, name, dtype, shape, on);
  return view->data;
}

void py_backward(const TensorView& q, const TensorView& subkeys, const TensorView& values,
                 double scale, bool softmax, bool per_head, const TensorView& indices,
                 const TensorView& weights, const Optional& d_out, const Optional& d_weights,
                 const Optional& d_q, const Optional& d_subkeys, const Optional& d_values,
                 const Optional& touched, const Optional& places, const Optional& scratch,
                 uintptr_t stream) {
  const int64_t k = indices.rank == 3 ? indices.shape[2] : 0;
  const Device on = device_of(q);
  const ProductKeys in = arguments(q, subkeys, values, k, scale, softmax, per_head, on);
  const bool on_kernels = runs(in, on, scratch);
  const int64_t rows = in.rows(), heads = in.heads(), n = in.keys(), dv = in.dv();
  // What may be read-only is checked by hand.
  const auto expect_input = [&](const TensorView& view, const char* name, DType dtype) {
    expect(view, kOp, name, {dtype}, 3, on);
    if (view.shape[0] != rows || view.shape[1] != heads || view.shape[2] != k ||
        !is_contiguous(view))
      bad_value(kOp, std::string(name) + " has shape " + shape_text(view) +
                         ", expected the contiguous " + shape_text(indices));
  };
  expect_input(indices, "indices", DType::i64);
  expect_input(weights, "weights", weight_type(in));
  ProductKeysGrad grad{};
  std::vector<int64_t> selected;  // a CUDA kernel looks at each index itself
  if (!on.is_cuda()) selected = rows_below(indices, in.entries(), n * n, kOp);
  grad.indices = on.is_cuda() ? static_cast<const int64_t*>(indices.data) : selected.data();
  grad.weights = weights.data;
  if (d_weights) {
    expect_input(*d_weights, "d_weights", weight_type(in));
    grad.d_weights = d_weights->data;
  }
  if (d_out) {
    expect(*d_out, kOp, "d_out", {DType::f32, DType::f16, DType::bf16, DType::f64}, 2, on);
    if (d_out->shape[0] != in.groups() || d_out->shape[1] != dv ||
        (d_out->dtype == DType::f64) != in.wide())
      bad_value(kOp, "d_out has shape " + shape_text(*d_out) + ", expected (" +
                         std::to_string(in.groups()) + ", " + std::to_string(dv) + ")");
    grad.d_out = *d_out;
  }
  grad.d_q = contiguous(d_q, "d_q", q.dtype, {rows, heads, 2 * in.half()}, on);
  grad.d_subkeys = contiguous(d_subkeys, "d_subkeys", subkeys.dtype, {heads, 2, n, in.half()}, on);
  int64_t value_rows = n * n;
  const int64_t* at = nullptr;
  if (places) {
    if (!on_kernels || !d_values) bad_value(kOp, "places go with d_values of CUDA kernels");
    expect_input(*places, "places", DType::i64);
    at = static_cast<const int64_t*>(places->data);
    value_rows = d_values->shape[0];
  }
  if (touched) {
    if (on_kernels) bad_value(kOp, "CUDA kernels take places");
    value_rows = count_distinct(grad.indices, in.entries(), n * n);
    if (!d_values) bad_value(kOp, "touched goes with d_values");
    grad.touched =
        static_cast<int64_t*>(contiguous(touched, "touched", DType::i64, {value_rows}, on));
    static int64_t nothing;
    if (!grad.touched) grad.touched = &nothing;  // no row: an empty array may have no address
  }
  grad.d_values = contiguous(d_values, "d_values", values.dtype, {value_rows, dv}, on);
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
  if (!on_kernels) return product_keys_backward(in, grad);
  const int64_t bytes =
      cuda::product_keys_backward_scratch(rows, heads, n, in.half(), k, dv, value_rows);
  cuda::product_keys_backward(stream_of(on, stream), in, grad, at, value_rows,
                              scratch_of(scratch, kOp, bytes, on));
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
  const auto no_scratch = py::arg("scratch") = py::none(), default_stream = py::arg("stream") = 0;
  m.def("pq_product_keys", &py_forward, py::arg("q"), py::arg("subkeys"), py::arg("values"),
        py::arg("k"), py::arg("scale"), py::arg("softmax"), py::arg("per_head"), py::arg("out"),
        py::arg("indices"), py::arg("weights"), no_scratch, default_stream, release);
  m.def("pq_product_keys_backward", &py_backward, py::arg("q"), py::arg("subkeys"),
        py::arg("values"), py::arg("scale"), py::arg("softmax"), py::arg("per_head"),
        py::arg("indices"), py::arg("weights"), py::arg("d_out"), py::arg("d_weights"),
        py::arg("d_q"), py::arg("d_subkeys"), py::arg("d_values"), py::arg("touched"),
        py::arg("places") = py::none(), no_scratch, default_stream, release);
  m.attr("pq_product_keys_cuda_max_k") = cuda::kMostEntries;
  m.def("pq_product_keys_scratch", &cuda::product_keys_scratch);
  m.def("pq_product_keys_backward_scratch", &cuda::product_keys_backward_scratch);
  m.def("pq_count_distinct", &py_distinct, release);
}

}  // namespace pentad
