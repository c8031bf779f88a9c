// SPDX-License-Identifier: Apache-2.0
// Checks arguments of the inverted lists (sparse/postings.h) and their search (sparse/search.h).
// Lengths are checked here; what stands in the arrays is checked where it leads to memory.
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/lists.h"
#include "bindings/sparse_rows.h"
#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "common/ceil_div.h"
#include "sparse/search.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace sparse;
using Optional = std::optional<TensorView>;

template <class T>
const T* column(const TensorView& view, const char* op, const char* name, DType dtype,
                int64_t count) {
  expect(view, op, name, {dtype}, 1);
  lists::expect_shape(view, op, name, {count});
  if (!is_contiguous(view)) bad_value(op, std::string(name) + " is not contiguous");
  static const T nothing{};
  return count ? static_cast<const T*>(view.data) : &nothing;
}

Forward forward_of(const TensorView& indptr, const TensorView& terms, const TensorView& values,
                   const Optional& scale, const char* op) {
  expect(indptr, op, "indptr", {DType::i64}, 1);
  expect(terms, op, "terms", {DType::i32}, 1);
  expect(values, op, "values", {DType::f32, DType::f16, DType::u8}, 1);
  if (indptr.shape[0] < 1) bad_value(op, "indptr is empty");
  Forward forward;
  forward.documents = indptr.shape[0] - 1;
  forward.entries = terms.shape[0];
  forward.dtype = values.dtype;
  forward.indptr = column<int64_t>(indptr, op, "indptr", DType::i64, indptr.shape[0]);
  forward.terms = column<int32_t>(terms, op, "terms", DType::i32, forward.entries);
  forward.values = column<uint8_t>(values, op, "values", values.dtype, forward.entries);
  if (scale) forward.scale = column<float>(*scale, op, "scale", DType::f32, forward.documents);
  if (values.dtype == DType::u8 && !scale) bad_value(op, "values are uint8 but scale is None");
  return forward;
}

Window window_of(const TensorView& terms, const TensorView& starts, const TensorView& scales,
                 const TensorView& postings, int64_t documents, const char* op) {
  expect(terms, op, "a window's terms", {DType::i32}, 1);
  expect(postings, op, "a window's postings", {DType::u8}, 1);
  Window window;
  window.count = terms.shape[0];
  window.bytes = postings.shape[0];
  window.documents = documents;
  window.terms = column<int32_t>(terms, op, "a window's terms", DType::i32, window.count);
  window.starts = column<int64_t>(starts, op, "a window's starts", DType::i64, window.count + 1);
  window.scales = column<float>(scales, op, "a window's scales", DType::f32, window.count);
  window.postings = column<uint8_t>(postings, op, "a window's postings", DType::u8, window.bytes);
  if (window.bytes && reinterpret_cast<uintptr_t>(window.postings) % 4)
    bad_value(op, "a window's postings do not begin at a multiple of 4 bytes");
  return window;
}

// A builder reads the arrays again when it writes, so it holds on to them.
struct HeldBuilder {
  std::deque<ViewHolder> held;
  std::unique_ptr<WindowBuilder> builder;
};

std::unique_ptr<HeldBuilder> build_py(const py::object& indptr, const py::object& terms,
                                      const py::object& values, const py::object& scale,
                                      int64_t first, int64_t last) {
  const char* op = "sparse.build";
  auto result = std::make_unique<HeldBuilder>();
  const auto hold = [&](const py::object& array) -> const TensorView& {
    result->held.emplace_back().borrow(array);
    return result->held.back().view;
  };
  const TensorView &starts = hold(indptr), &columns = hold(terms), &entries = hold(values);
  const Forward forward = forward_of(starts, columns, entries,
                                     scale.is_none() ? std::nullopt : Optional(hold(scale)), op);
  if (first < 0 || first > last || last > forward.documents || last - first > kWindow)
    bad_value(op, "[" + std::to_string(first) + ", " + std::to_string(last) + ") is no window of " +
                      std::to_string(forward.documents) + " documents");
  // Rows that overlap could ask for any amount of memory.
  for (int64_t i = first; i < last; ++i)
    if (forward.indptr[i] > forward.indptr[i + 1]) bad_value(op, "indptr descends");
  py::gil_scoped_release release;
  result->builder = std::make_unique<WindowBuilder>(forward, first, last);
  return result;
}

void write_py(const HeldBuilder& held, const TensorView& terms, const TensorView& starts,
              const TensorView& scales, const TensorView& postings) {
  const char* op = "sparse.build";
  const WindowBuilder& builder = *held.builder;
  expect_output(terms, op, "terms", DType::i32, {builder.count()});
  expect_output(starts, op, "starts", DType::i64, {builder.count() + 1});
  expect_output(scales, op, "scales", DType::f32, {builder.count()});
  expect_output(postings, op, "postings", DType::u8, {builder.bytes()});
  Writes writes(op);
  writes.output("terms", terms), writes.output("starts", starts);
  writes.output("scales", scales), writes.output("postings", postings);
  writes.finish();
  py::gil_scoped_release release;
  builder.write(static_cast<int32_t*>(terms.data), static_cast<int64_t*>(starts.data),
                static_cast<float*>(scales.data), static_cast<uint8_t*>(postings.data));
}

std::optional<std::string> defect_py(const TensorView& terms, const TensorView& starts,
                                     const TensorView& scales, const TensorView& postings,
                                     int64_t documents) {
  const Window window = window_of(terms, starts, scales, postings, documents, "sparse.check");
  const char* defect = nullptr;
  {
    py::gil_scoped_release release;
    defect = defect_of(window);
  }
  return defect ? std::optional<std::string>(defect) : std::nullopt;
}

// Queries, of which the boundaries are a copy.
struct QueryRows {
  std::vector<int64_t> indptr;
  SparseQueries queries;

  QueryRows(const TensorView& bounds, const TensorView& terms, const TensorView& weights,
            const char* op) {
    expect(terms, op, "query terms", {DType::i32}, 1);
    indptr = lists::boundaries(bounds, terms.shape[0], op, "query indptr", "query terms");
    queries.indptr = indptr.data();
    queries.count = static_cast<int64_t>(indptr.size()) - 1;
    queries.terms = column<int32_t>(terms, op, "query terms", DType::i32, terms.shape[0]);
    queries.weights = column<float>(weights, op, "query weights", DType::f32, terms.shape[0]);
  }
};

// One state of an index. Its arrays are borrowed and looked at once: with them, a search of one
// query of some words took 40 us, of which the search proper took 25.
class HeldLists {
 public:
  HeldLists(const py::list& windows, const py::object& indptr, const py::object& terms,
            const py::object& values, const py::object& scale) {
    const TensorView &starts = hold(indptr), &columns = hold(terms), &entries = hold(values);
    documents_.forward = forward_of(starts, columns, entries,
                                    scale.is_none() ? std::nullopt : Optional(hold(scale)), kOp);
    const int64_t n = documents_.forward.documents;
    if (static_cast<int64_t>(windows.size()) != ceil_div(n, kWindow))
      bad_value(
          kOp, std::to_string(windows.size()) + " windows for " + std::to_string(n) + " documents");
    for (const py::handle& item : windows) {
      const auto arrays = py::cast<py::tuple>(item);
      if (arrays.size() != 4) bad_value(kOp, "a window has not four arrays");
      const TensorView* views[4];
      for (size_t i = 0; i < 4; ++i) views[i] = &hold(arrays[i]);
      const int64_t first = static_cast<int64_t>(documents_.windows.size()) * kWindow;
      documents_.windows.push_back(
          window_of(*views[0], *views[1], *views[2], *views[3], std::min(n - first, kWindow), kOp));
    }
  }

  // Queries as callers have them, of `columns` terms.
  void search(const std::string& op, const TensorView& indptr, const TensorView& indices,
              const TensorView& weights, int64_t columns, const Optional& mask, int64_t k,
              int64_t query_cut, double block_factor, double alpha, const TensorView& scores,
              const TensorView& positions) const {
    const GivenArrays asked(op.c_str(), "queries", indptr, indices, weights, columns);
    const int64_t n = documents_.forward.documents, nq = asked.given.rows;
    Documents documents = documents_;
    if (mask) documents.mask = column<uint8_t>(*mask, kOp, "mask", DType::boolean, n);
    if (k < 0) bad_value(kOp, "k is " + std::to_string(k));
    if (query_cut < 0 || !(block_factor >= 0) || !(alpha >= 0) || !(alpha <= 1))
      bad_value(kOp, "query_cut, block_factor or alpha is out of range");
    expect_output(scores, kOp, "scores", DType::f32, {nq, k});
    expect_output(positions, kOp, "positions", DType::i64, {nq, k});
    Writes writes(kOp);
    for (const ViewHolder& array : held_) writes.input("an array of the index", array.view);
    writes.input("query indices", indices), writes.input("query weights", weights);
    writes.input("mask", mask);
    writes.output("scores", scores), writes.output("positions", positions);
    writes.finish();
    py::gil_scoped_release release;
    const CanonicalRows canonical(asked.given, DType::f32);
    const Rows<float> rows = canonical.rows<float>();
    check_weights(rows, op);
    topk(documents, {rows.indptr, rows.indices, rows.values, rows.rows}, k,
         {query_cut, block_factor, alpha}, static_cast<float*>(scores.data),
         static_cast<int64_t*>(positions.data));
  }

 private:
  static constexpr const char* kOp = "sparse.search";
  static constexpr float kMostWeight = 0x1p48f;  // a score of 2^31 products stays below 2^128

  const TensorView& hold(const py::object& array) {
    held_.emplace_back().borrow(array);
    return held_.back().view;
  }

  static void check_weights(const Rows<float>& rows, const std::string& op) {
    float most = 0;
    for (int64_t i = 0; i < rows.nnz; ++i) most = std::max(most, std::fabs(rows.values[i]));
    if (most <= kMostWeight) return;
    std::ostringstream text;
    text << "queries has the value " << most << ", expected at most 2**48";
    bad_value(op.c_str(), text.str());
  }

  std::deque<ViewHolder> held_;
  Documents documents_;
};

void scores_at_py(const TensorView& indptr, const TensorView& terms, const TensorView& values,
                  const Optional& scale, const TensorView& query_indptr,
                  const TensorView& query_terms, const TensorView& query_weights,
                  const TensorView& candidates, const TensorView& scores) {
  const char* op = "sparse.scores_at";
  const Forward forward = forward_of(indptr, terms, values, scale, op);
  const QueryRows rows(query_indptr, query_terms, query_weights, op);
  expect(candidates, op, "positions", {DType::i64}, 2);
  const int64_t c = candidates.shape[1];
  lists::expect_shape(candidates, op, "positions", {rows.queries.count, c});
  if (!is_contiguous(candidates)) bad_value(op, "positions are not contiguous");
  expect_output(scores, op, "scores", DType::f32, {rows.queries.count, c});
  Writes writes(op);
  writes.input("indptr", indptr), writes.input("terms", terms), writes.input("values", values);
  writes.input("scale", scale), writes.input("positions", candidates);
  writes.input("query_terms", query_terms), writes.input("query_weights", query_weights);
  writes.output("scores", scores);
  writes.finish();
  py::gil_scoped_release release;
  scores_at(forward, rows.queries, static_cast<const int64_t*>(candidates.data), c,
            static_cast<float*>(scores.data));
}

}  // namespace

void bind_sparse_index(py::module_& m) {
  m.attr("sparse_window") = kWindow;
  py::class_<HeldBuilder>(m, "SparseWindowBuilder")
      .def_property_readonly("count", [](const HeldBuilder& b) { return b.builder->count(); })
      .def_property_readonly("bytes", [](const HeldBuilder& b) { return b.builder->bytes(); })
      .def("write", write_py, py::arg("terms"), py::arg("starts"), py::arg("scales"),
           py::arg("postings"));
  m.def("sparse_build", build_py, py::arg("indptr"), py::arg("terms"), py::arg("values"),
        py::arg("scale"), py::arg("first"), py::arg("last"));
  m.def("sparse_defect", defect_py, py::arg("terms"), py::arg("starts"), py::arg("scales"),
        py::arg("postings"), py::arg("documents"));
  py::class_<HeldLists>(m, "SparseLists")
      .def(py::init<const py::list&, const py::object&, const py::object&, const py::object&,
                    const py::object&>(),
           py::arg("windows"), py::arg("indptr"), py::arg("terms"), py::arg("values"),
           py::arg("scale"))
      .def("search", &HeldLists::search, py::arg("op"), py::arg("query_indptr"),
           py::arg("query_indices"), py::arg("query_weights"), py::arg("columns"), py::arg("mask"),
           py::arg("k"), py::arg("query_cut"), py::arg("block_factor"), py::arg("alpha"),
           py::arg("scores"), py::arg("positions"));
  m.def("sparse_scores_at", scores_at_py, py::arg("indptr"), py::arg("terms"), py::arg("values"),
        py::arg("scale"), py::arg("query_indptr"), py::arg("query_terms"), py::arg("query_weights"),
        py::arg("positions"), py::arg("scores"));
}

}  // namespace pentad
