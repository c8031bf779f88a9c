// SPDX-License-Identifier: Apache-2.0
// Checks the arguments of sparse/splade.h. Outputs are allocated by the caller.
#include <algorithm>
#include <string>
#include <vector>

#include "bindings/lists.h"
#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "sparse/splade.h"
#include "sparse/splade_cuda.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace sparse;
using Optional = std::optional<TensorView>;

constexpr const char* kOp = "sparse.splade_head";

SpladeHead head_of(const TensorView& hidden, const TensorView& weight, const Optional& bias,
                   const Optional& mask, const std::string& pooling, const std::string& activation,
                   Device on) {
  expect(hidden, kOp, "hidden", {DType::f32, DType::f16, DType::bf16, DType::f64}, 3, on);
  expect(weight, kOp, "weight", {hidden.dtype}, 2, on);
  if (weight.shape[1] != hidden.shape[2])
    bad_value(kOp, "weight has shape " + shape_text(weight) + " but hidden " + shape_text(hidden));
  if (hidden.shape[1] > INT32_MAX ||
      hidden.shape[0] > INT32_MAX / std::max<int64_t>(1, hidden.shape[1]))
    bad_value(kOp, "hidden has shape " + shape_text(hidden) + ", more than 2^31 - 1 tokens");
  if (bias) {
    expect(*bias, kOp, "bias", {hidden.dtype}, 1, on);
    if (bias->shape[0] != weight.shape[0])
      bad_value(kOp, "bias has shape " + shape_text(*bias) + " but weight " + shape_text(weight));
  }
  if (mask) {
    expect(*mask, kOp, "attention_mask",
           {DType::boolean, DType::u8, DType::i8, DType::i16, DType::i32, DType::i64, DType::f32,
            DType::f16, DType::bf16, DType::f64},
           2, on);
    if (mask->shape[0] != hidden.shape[0] || mask->shape[1] != hidden.shape[1])
      bad_value(kOp, "attention_mask has shape " + shape_text(*mask) + " but hidden " +
                         shape_text(hidden));
  }
  SpladeHead head{hidden, weight, bias, mask};
  if (pooling == "sum") head.pooling = SpladePooling::sum;
  else if (pooling != "max")
    bad_value(kOp, "pooling is '" + pooling + "', expected 'max' or 'sum'");
  if (activation == "log1p_log1p_relu") head.activation = SpladeActivation::log1p_log1p_relu;
  else if (activation != "log1p_relu")
    bad_value(kOp,
              "activation is '" + activation + "', expected 'log1p_relu' or 'log1p_log1p_relu'");
  return head;
}

// A device's kernels are not to read what the host cannot see; here it can.
void check_mask(const SpladeHead& head, Device on) {
  if (on.is_cuda()) return;
  std::vector<int32_t> tokens(head.length());
  int64_t count = 0;
  for (int64_t b = 0; b < head.batch(); ++b) splade_tokens(head, b, tokens.data(), &count);
}

void check_places(const SpladeHead& head, const int32_t* places, Device on) {
  if (on.is_cuda()) return;
  std::vector<int32_t> tokens(head.length());
  int64_t count = 0;
  for (int64_t b = 0; b < head.batch(); ++b) {
    splade_tokens(head, b, tokens.data(), &count);
    for (int64_t v = 0; v < head.vocabulary(); ++v) {
      const int32_t l = places[b * head.vocabulary() + v];
      if (l != -1 && !std::binary_search(tokens.begin(), tokens.begin() + count, l))
        bad_value(kOp, "place is no token with mask 1");
    }
  }
}

DType wide_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// out (B, V); top (B, V) float32 or float64 and place (B, V) int32, or None.
void head_py(const TensorView& hidden, const TensorView& weight, const Optional& bias,
             const Optional& mask, const std::string& pooling, const std::string& activation,
             const TensorView& out, const Optional& top, const Optional& place,
             const Optional& scratch, uintptr_t stream) {
  const Device on = device_of(hidden);
  const bool cuda = runs_cuda(on, hidden.dtype != DType::f64, kOp, "float64");
  const SpladeHead head = head_of(hidden, weight, bias, mask, pooling, activation, on);
  const auto shape = {head.batch(), head.vocabulary()};
  expect_output(out, kOp, "out", hidden.dtype, shape, on);
  if (top) expect_output(*top, kOp, "top", wide_of(hidden.dtype), shape, on);
  if (place) expect_output(*place, kOp, "place", DType::i32, shape, on);
  Writes writes(kOp);
  writes.input("hidden", hidden), writes.input("weight", weight);
  writes.input("bias", bias), writes.input("attention_mask", mask);
  writes.output("out", out);
  if (top) writes.output("top", *top);
  if (place) writes.output("place", *place);
  writes.finish();
  const SpladeOutputs outputs{out.data, top ? top->data : nullptr,
                              place ? static_cast<int32_t*>(place->data) : nullptr};
  if (cuda) {
    check_mask(head, on);
    const int64_t bytes = cuda::splade_scratch(head.batch(), head.length());
    return cuda::splade_head(stream_of(on, stream), head, outputs,
                             scratch_of(scratch, kOp, bytes, on));
  }
  py::gil_scoped_release release;
  splade_head(head, outputs);
}

void backward_py(const TensorView& d_out, const TensorView& hidden, const TensorView& weight,
                 const Optional& bias, const Optional& mask, const Optional& top,
                 const Optional& place, const std::string& pooling, const std::string& activation,
                 const Optional& d_hidden, const Optional& d_weight, const Optional& d_bias,
                 const Optional& scratch, uintptr_t stream) {
  const Device on = device_of(d_out);
  const bool cuda = runs_cuda(on, hidden.dtype != DType::f64, kOp, "float64");
  const SpladeHead head = head_of(hidden, weight, bias, mask, pooling, activation, on);
  const int64_t batch = head.batch(), columns = head.vocabulary();
  const auto pooled = [&](const TensorView& view, const char* name, DType dtype) {
    expect(view, kOp, name, {dtype}, 2, on);
    if (view.shape[0] != batch || view.shape[1] != columns)
      bad_value(kOp, std::string(name) + " has shape " + shape_text(view) + ", expected (" +
                         std::to_string(batch) + ", " + std::to_string(columns) + ")");
  };
  pooled(d_out, "d_out", hidden.dtype);
  if (head.pooling == SpladePooling::max) {
    if (!top || !place) bad_value(kOp, "max pooling needs top and place");
    pooled(*top, "top", wide_of(hidden.dtype));
    pooled(*place, "place", DType::i32);
    if (!is_contiguous(*top) || !is_contiguous(*place))
      bad_value(kOp, "top and place are not contiguous");
  }
  Writes writes(kOp);
  writes.input("d_out", d_out), writes.input("hidden", hidden), writes.input("weight", weight);
  writes.input("bias", bias), writes.input("attention_mask", mask);
  writes.input("top", top), writes.input("place", place);
  if (d_hidden) {
    expect_output(*d_hidden, kOp, "d_hidden", hidden.dtype, {batch, head.length(), head.dim()}, on);
    writes.output("d_hidden", *d_hidden);
  }
  if (d_weight) {
    expect_output(*d_weight, kOp, "d_weight", hidden.dtype, {columns, head.dim()}, on);
    writes.output("d_weight", *d_weight);
  }
  if (d_bias) {
    expect_output(*d_bias, kOp, "d_bias", hidden.dtype, {columns}, on);
    writes.output("d_bias", *d_bias);
  }
  writes.finish();
  const auto data = [](const Optional& view) { return view ? view->data : nullptr; };
  const SpladeGradients gradients{
      d_out,          data(top),      static_cast<const int32_t*>(data(place)),
      data(d_hidden), data(d_weight), data(d_bias)};
  if (cuda) {
    if (gradients.place) check_places(head, gradients.place, on);
    const int64_t bytes = cuda::splade_backward_scratch(head);
    return cuda::splade_head_backward(stream_of(on, stream), head, gradients,
                                      scratch_of(scratch, kOp, bytes, on));
  }
  py::gil_scoped_release release;
  splade_head_backward(head, gradients);
}

void expect_rows(const TensorView& x, const char* name) {
  expect(x, kOp, name, {DType::f32, DType::f16, DType::bf16, DType::f64}, 2);
  if (!is_contiguous(x)) bad_value(kOp, std::string(name) + " is not contiguous");
}

// x (rows, columns), of which the k largest of each row stay.
void keep_py(const TensorView& x, int64_t k) {
  expect_rows(x, "x");
  expect_output(x, kOp, "x", x.dtype, {x.shape[0], x.shape[1]});
  if (k < 1) bad_value(kOp, "top_k is " + std::to_string(k) + ", expected at least 1");
  py::gil_scoped_release release;
  splade_keep(x.data, x.dtype, x.shape[0], x.shape[1], k);
}

void count_py(const TensorView& x, const TensorView& indptr) {
  expect_rows(x, "x");
  expect_output(indptr, kOp, "indptr", DType::i64, {x.shape[0] + 1});
  py::gil_scoped_release release;
  splade_count(x.data, x.dtype, x.shape[0], x.shape[1], static_cast<int64_t*>(indptr.data));
}

// indptr as `count` gave it for the same x.
void compress_py(const TensorView& x, const TensorView& indptr, const TensorView& indices,
                 const TensorView& values) {
  expect_rows(x, "x");
  expect_output(indptr, kOp, "indptr", DType::i64, {x.shape[0] + 1});
  const std::vector<int64_t> starts = lists::integers(indptr, kOp, "indptr");
  if (starts[0] != 0 || !std::is_sorted(starts.begin(), starts.end()))
    bad_value(kOp, "indptr descends");
  const int64_t count = starts.back();
  expect_output(indices, kOp, "indices", DType::i64, {count});
  expect_output(values, kOp, "values", x.dtype, {count});
  py::gil_scoped_release release;
  splade_compress(x.data, x.dtype, x.shape[0], x.shape[1], starts.data(),
                  static_cast<int64_t*>(indices.data), values.data);
}

}  // namespace

void bind_sparse_splade(py::module_& m) {
  m.def("sparse_splade_head", head_py, py::arg("hidden"), py::arg("weight"), py::arg("bias"),
        py::arg("mask"), py::arg("pooling"), py::arg("activation"), py::arg("out"), py::arg("top"),
        py::arg("place"), py::arg("scratch") = py::none(), py::arg("stream") = 0);
  m.def("sparse_splade_scratch", &cuda::splade_scratch);
  // Of the shapes of hidden and weight, the bytes of a number, and pooling.
  m.def("sparse_splade_backward_scratch",
        [](int64_t batch, int64_t length, int64_t dim, int64_t vocabulary, int64_t size, bool sum) {
          SpladeHead head;
          head.pooling = sum ? SpladePooling::sum : SpladePooling::max;
          head.hidden.dtype = size == 4 ? DType::f32 : DType::f16;
          head.hidden.shape[0] = batch, head.hidden.shape[1] = length, head.hidden.shape[2] = dim;
          head.weight.shape[0] = vocabulary;
          return cuda::splade_backward_scratch(head);
        });
  m.def("sparse_splade_head_backward", backward_py, py::arg("d_out"), py::arg("hidden"),
        py::arg("weight"), py::arg("bias"), py::arg("mask"), py::arg("top"), py::arg("place"),
        py::arg("pooling"), py::arg("activation"), py::arg("d_hidden"), py::arg("d_weight"),
        py::arg("d_bias"), py::arg("scratch") = py::none(), py::arg("stream") = 0);
  m.def("sparse_splade_keep", keep_py, py::arg("x"), py::arg("k"));
  m.def("sparse_splade_count", count_py, py::arg("x"), py::arg("indptr"));
  m.def("sparse_splade_compress", compress_py, py::arg("x"), py::arg("indptr"), py::arg("indices"),
        py::arg("values"));
}

}  // namespace pentad
