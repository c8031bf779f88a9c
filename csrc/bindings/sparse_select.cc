// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <limits>

#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "sparse/score_cuda.h"
#include "sparse/select.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace sparse;

FloatRows rows_of(const TensorView& x, int64_t k, const char* op, Device on) {
  expect(x, op, "x", {DType::f32, DType::f16, DType::bf16, DType::f64}, 2, on);
  if (x.shape[1] > std::numeric_limits<int32_t>::max())
    bad_value(op, "x has " + std::to_string(x.shape[1]) + " columns, expected fewer than 2^31");
  if (k < 0 || k > x.shape[1])
    bad_value(op, "k is " + std::to_string(k) + ", expected 0 to " + std::to_string(x.shape[1]));
  return {x.data, x.dtype, x.shape[0], x.shape[1], x.strides[0], x.strides[1]};
}

void py_topk(const TensorView& x, int64_t k, bool absolute, const TensorView& indices,
             const std::optional<TensorView>& values, uintptr_t stream) {
  const char* op = "sparse.topk_codes";
  const Device on = device_of(x);
  const bool cuda = runs_cuda(on, x.dtype != DType::f64, op, "float64");
  const FloatRows rows = rows_of(x, k, op, on);
  expect(indices, op, "indices", {DType::i32, DType::i64}, 2, on);
  expect_output(indices, op, "indices", indices.dtype, {rows.rows, k}, on);
  if (values) expect_output(*values, op, "values", x.dtype, {rows.rows, k}, on);
  Writes writes(op);
  writes.input("x", x);
  writes.output("indices", indices);
  if (values) writes.output("values", *values);
  writes.finish();
  void* to = values ? values->data : nullptr;
  if (cuda)
    return cuda::select_topk(stream_of(on, stream), rows, k, absolute, indices.data, indices.dtype,
                             to, nullptr);
  py::gil_scoped_release release;
  select_topk(rows, k, absolute, indices.data, indices.dtype, to);
}

void py_sparsify(const TensorView& x, int64_t k, bool absolute, const TensorView& out,
                 uintptr_t stream) {
  const char* op = "sparse.topk_sparsify";
  const Device on = device_of(x);
  const bool cuda = runs_cuda(on, x.dtype != DType::f64, op, "float64");
  const FloatRows rows = rows_of(x, k, op, on);
  expect_output(out, op, "out", x.dtype, {rows.rows, rows.columns}, on);
  Writes writes(op);
  writes.input("x", x);
  writes.output("out", out);
  writes.finish();
  if (cuda)
    return cuda::select_topk(stream_of(on, stream), rows, k, absolute, nullptr, DType::i32, nullptr,
                             out.data);
  py::gil_scoped_release release;
  sparsify_topk(rows, k, absolute, out.data);
}

}  // namespace

void bind_sparse_select(py::module_& m) {
  m.def("sparse_topk", &py_topk, py::arg("x"), py::arg("k"), py::arg("absolute"),
        py::arg("indices"), py::arg("values"), py::arg("stream") = 0);
  m.def("sparse_topk_sparsify", &py_sparsify, py::arg("x"), py::arg("k"), py::arg("absolute"),
        py::arg("out"), py::arg("stream") = 0);
}

}  // namespace pentad
