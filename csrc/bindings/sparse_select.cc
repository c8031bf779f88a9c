// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <limits>

#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "sparse/select.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace sparse;

FloatRows rows_of(const TensorView& x, int64_t k, const char* op) {
  expect(x, op, "x", {DType::f32, DType::f16, DType::bf16, DType::f64}, 2);
  if (x.shape[1] > std::numeric_limits<int32_t>::max())
    bad_value(op, "x has " + std::to_string(x.shape[1]) + " columns, expected fewer than 2^31");
  if (k < 0 || k > x.shape[1])
    bad_value(op, "k is " + std::to_string(k) + ", expected 0 to " + std::to_string(x.shape[1]));
  return {x.data, x.dtype, x.shape[0], x.shape[1], x.strides[0], x.strides[1]};
}

void py_topk(const TensorView& x, int64_t k, bool absolute, const TensorView& indices,
             const std::optional<TensorView>& values) {
  const char* op = "sparse.topk_codes";
  const FloatRows rows = rows_of(x, k, op);
  expect(indices, op, "indices", {DType::i32, DType::i64}, 2);
  expect_output(indices, op, "indices", indices.dtype, {rows.rows, k});
  if (values) expect_output(*values, op, "values", x.dtype, {rows.rows, k});
  Writes writes(op);
  writes.input("x", x);
  writes.output("indices", indices);
  if (values) writes.output("values", *values);
  writes.finish();
  py::gil_scoped_release release;
  select_topk(rows, k, absolute, indices.data, indices.dtype, values ? values->data : nullptr);
}

void py_sparsify(const TensorView& x, int64_t k, bool absolute, const TensorView& out) {
  const char* op = "sparse.topk_sparsify";
  const FloatRows rows = rows_of(x, k, op);
  expect_output(out, op, "out", x.dtype, {rows.rows, rows.columns});
  Writes writes(op);
  writes.input("x", x);
  writes.output("out", out);
  writes.finish();
  py::gil_scoped_release release;
  sparsify_topk(rows, k, absolute, out.data);
}

}  // namespace

void bind_sparse_select(py::module_& m) {
  m.def("sparse_topk", &py_topk);
  m.def("sparse_topk_sparsify", &py_sparsify);
}

}  // namespace pentad
