// SPDX-License-Identifier: Apache-2.0
// The entries of sparse scores on a device. Rows come in the one form of sparse/csr.h: Python sees to
// their contents (pentad.sparse._csr_device), and the kernels touch nothing else where it did not.
#include <string>

#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "sparse/score_cuda.h"
#include "sparse/search_cuda.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace sparse;
using Optional = std::optional<TensorView>;

constexpr const char* kOp = "sparse.score";

void expect_vector(const TensorView& view, const char* name, DType dtype, int64_t size, Device on) {
  expect(view, kOp, name, {dtype}, 1, on);
  if ((size >= 0 && view.shape[0] != size) || !is_contiguous(view))
    bad_value(kOp, std::string(name) + " has shape " + shape_text(view) + " or is not contiguous");
}

Rows<float> rows_of(const TensorView& indptr, const TensorView& indices, const TensorView& values,
                    Device on) {
  expect_vector(indptr, "indptr", DType::i64, -1, on);
  if (indptr.shape[0] < 1) bad_value(kOp, "indptr is empty");
  expect_vector(indices, "indices", DType::i32, -1, on);
  expect_vector(values, "values", DType::f32, indices.shape[0], on);
  return {indptr.shape[0] - 1, indices.shape[0], static_cast<const int64_t*>(indptr.data),
          static_cast<const int32_t*>(indices.data), static_cast<const float*>(values.data)};
}

void check_columns(int64_t columns) {
  if (columns < 0 || columns > kMostColumns)
    bad_value(kOp, "there are " + std::to_string(columns) + " columns");
}

Device cuda_device(const TensorView& view) {
  const Device on = device_of(view);
  if (!runs_cuda(on)) throw DeviceMismatch("[sparse.score] arguments are not on a CUDA device");
  return on;
}

float* gradient(const Optional& view, const char* name, int64_t size, Device on) {
  if (!view) return nullptr;
  expect_output(*view, kOp, name, DType::f32, {size}, on);
  return static_cast<float*>(view->data);
}

void py_score(const TensorView& q_indptr, const TensorView& q_indices, const TensorView& q_values,
              const TensorView& d_indptr, const TensorView& d_indices, const TensorView& d_values,
              int64_t columns, const TensorView& out, const Optional& scratch, uintptr_t stream) {
  const Device on = cuda_device(q_values);
  const Rows<float> queries = rows_of(q_indptr, q_indices, q_values, on);
  const Rows<float> docs = rows_of(d_indptr, d_indices, d_values, on);
  check_columns(columns);
  expect_output(out, kOp, "out", DType::f32, {queries.rows, docs.rows}, on);
  const int64_t bytes = cuda::score_scratch(queries.rows, columns);
  cuda::score(stream_of(on, stream), queries, docs, columns, static_cast<float*>(out.data),
              scratch_of(scratch, kOp, bytes, on));
}

void py_backward(const TensorView& d_out, const TensorView& q_indptr, const TensorView& q_indices,
                 const TensorView& q_values, const TensorView& d_indptr,
                 const TensorView& d_indices, const TensorView& d_values, int64_t columns,
                 const Optional& d_queries, const Optional& d_docs, const Optional& scratch,
                 uintptr_t stream) {
  const Device on = cuda_device(q_values);
  const Rows<float> queries = rows_of(q_indptr, q_indices, q_values, on);
  const Rows<float> docs = rows_of(d_indptr, d_indices, d_values, on);
  check_columns(columns);
  TensorView g = d_out;
  g.read_only = false;
  expect_output(g, kOp, "d_out", DType::f32, {queries.rows, docs.rows}, on);
  float* dq = gradient(d_queries, "d_queries", queries.nnz, on);
  float* dd = gradient(d_docs, "d_docs", docs.nnz, on);
  const int64_t bytes =
      cuda::score_backward_scratch(queries.rows, docs.rows, queries.nnz, docs.nnz, columns);
  cuda::score_backward(stream_of(on, stream), queries, docs, columns,
                       static_cast<const float*>(d_out.data), dq, dd,
                       scratch_of(scratch, kOp, bytes, on));
}

void py_pairs(const TensorView& q_indptr, const TensorView& q_indices, const TensorView& q_values,
              const TensorView& d_indptr, const TensorView& d_indices, const TensorView& d_values,
              const TensorView& query, const TensorView& doc, const TensorView& out,
              uintptr_t stream) {
  const Device on = cuda_device(q_values);
  const Rows<float> queries = rows_of(q_indptr, q_indices, q_values, on);
  const Rows<float> docs = rows_of(d_indptr, d_indices, d_values, on);
  expect_vector(query, "pairs", DType::i64, -1, on);
  expect_vector(doc, "pairs", DType::i64, query.shape[0], on);
  expect_output(out, kOp, "out", DType::f32, {query.shape[0]}, on);
  const Pairs pairs{query.shape[0], static_cast<const int64_t*>(query.data),
                    static_cast<const int64_t*>(doc.data)};
  cuda::score_pairs(stream_of(on, stream), queries, docs, pairs, static_cast<float*>(out.data));
}

// The gradient of one side's values.
void py_pairs_backward(const TensorView& d_out, const TensorView& indptr, const TensorView& indices,
                       const TensorView& values, const TensorView& o_indptr,
                       const TensorView& o_indices, const TensorView& o_values,
                       const TensorView& starts, const TensorView& order, const TensorView& other,
                       const TensorView& out, uintptr_t stream) {
  const Device on = cuda_device(values);
  const Rows<float> side = rows_of(indptr, indices, values, on);
  const Rows<float> others = rows_of(o_indptr, o_indices, o_values, on);
  expect_vector(d_out, "d_out", DType::f32, -1, on);
  expect_vector(starts, "starts", DType::i64, side.rows + 1, on);
  expect_vector(order, "order", DType::i64, d_out.shape[0], on);
  expect_vector(other, "other", DType::i64, d_out.shape[0], on);
  expect_output(out, kOp, "out", DType::f32, {side.nnz}, on);
  const cuda::PairsOfRows pairs{static_cast<const int64_t*>(starts.data),
                                static_cast<const int64_t*>(order.data),
                                static_cast<const int64_t*>(other.data), d_out.shape[0]};
  cuda::score_pairs_backward(stream_of(on, stream), side, others, pairs,
                             static_cast<const float*>(d_out.data), static_cast<float*>(out.data));
}

void py_search(const TensorView& windows, const TensorView& list_terms, const TensorView& starts,
               const TensorView& places, const TensorView& values, int64_t documents,
               const TensorView& q_indptr, const TensorView& q_indices, const TensorView& q_values,
               const Optional& mask, const TensorView& scores, const TensorView& ids,
               const Optional& scratch, uintptr_t stream) {
  const Device on = cuda_device(values);
  const Rows<float> queries = rows_of(q_indptr, q_indices, q_values, on);
  if (documents < 0 || documents > cuda::kMostDocuments)
    bad_value(kOp, "there are " + std::to_string(documents) + " documents");
  const int64_t count = (documents + cuda::kWindowRows - 1) / cuda::kWindowRows;
  expect_vector(windows, "windows", DType::i64, count + 1, on);
  expect_vector(list_terms, "list_terms", DType::i32, -1, on);
  expect_vector(starts, "starts", DType::i64, list_terms.shape[0] + 1, on);
  expect_vector(places, "places", DType::i16, -1, on);
  expect_vector(values, "values", DType::f32, places.shape[0], on);
  if (mask) expect_vector(*mask, "mask", DType::boolean, documents, on);
  const int64_t k = scores.rank == 2 ? scores.shape[1] : 0;
  if (k > cuda::kMostHits)
    bad_value(kOp, "k is " + std::to_string(k) + ", a device takes at most " +
                       std::to_string(cuda::kMostHits));
  expect_output(scores, kOp, "scores", DType::f32, {queries.rows, k}, on);
  expect_output(ids, kOp, "ids", DType::i64, {queries.rows, k}, on);
  const cuda::Inverted docs{documents,
                            list_terms.shape[0],
                            places.shape[0],
                            static_cast<const int64_t*>(windows.data),
                            static_cast<const int32_t*>(list_terms.data),
                            static_cast<const int64_t*>(starts.data),
                            static_cast<const int16_t*>(places.data),
                            static_cast<const float*>(values.data),
                            mask ? static_cast<const uint8_t*>(mask->data) : nullptr};
  const int64_t bytes = cuda::search_scratch(queries.rows, documents, k);
  cuda::search(stream_of(on, stream), docs, queries, k, static_cast<float*>(scores.data),
               static_cast<int64_t*>(ids.data), scratch_of(scratch, kOp, bytes, on));
}

}  // namespace

void bind_sparse_score_cuda(py::module_& m) {
  m.attr("sparse_device_window") = cuda::kWindowRows;
  m.attr("sparse_device_most_hits") = cuda::kMostHits;
  m.def("sparse_search_scratch", &cuda::search_scratch);
  m.def("sparse_search_cuda", &py_search);
  m.def("sparse_score_scratch", &cuda::score_scratch);
  m.def("sparse_score_cuda", &py_score);
  m.def("sparse_score_backward_scratch", &cuda::score_backward_scratch);
  m.def("sparse_score_backward_cuda", &py_backward);
  m.def("sparse_score_pairs_cuda", &py_pairs);
  m.def("sparse_score_pairs_backward_cuda", &py_pairs_backward);
}

}  // namespace pentad
