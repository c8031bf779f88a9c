// SPDX-License-Identifier: Apache-2.0
// The entries of sparse rows and their scores. Indices and values are checked while they are read.
#include <string>
#include <tuple>
#include <vector>

#include "bindings/lists.h"
#include "bindings/sparse_rows.h"
#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "sparse/score.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace sparse;
using Optional = std::optional<TensorView>;

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void bind_rows(py::module_& m) {
  m.def("sparse_check", [](const std::string& op, const std::string& name, const TensorView& indptr,
                           const TensorView& indices, const TensorView& values, int64_t columns) {
    const GivenArrays a(op.c_str(), name.c_str(), indptr, indices, values, columns);
    py::gil_scoped_release release;
    const Found found = check(a.given);
    return std::make_tuple(found.canonical, found.last);
  });
  m.def("sparse_merge", [](const std::string& op, const std::string& name, const TensorView& indptr,
                           const TensorView& indices, const TensorView& values, int64_t columns,
                           const TensorView& out_indptr, const TensorView& out_indices,
                           const TensorView& out_values, const TensorView& place) {
    const GivenArrays a(op.c_str(), name.c_str(), indptr, indices, values, columns);
    const int64_t nnz = a.given.nnz;
    expect_output(out_indptr, op.c_str(), "out_indptr", DType::i64, {a.given.rows + 1});
    expect_output(out_indices, op.c_str(), "out_indices", DType::i32, {nnz});
    expect_output(out_values, op.c_str(), "out_values", wide(values.dtype), {nnz});
    expect_output(place, op.c_str(), "place", DType::i64, {nnz});
    Writes writes(op.c_str());
    writes.input("indices", indices);
    writes.input("values", values);
    writes.output("out_indptr", out_indptr);
    writes.output("out_indices", out_indices);
    writes.output("out_values", out_values);
    writes.output("place", place);
    writes.finish();
    py::gil_scoped_release release;
    check(a.given);
    return merge(a.given, wide(values.dtype), static_cast<int64_t*>(out_indptr.data),
                 static_cast<int32_t*>(out_indices.data), out_values.data,
                 static_cast<int64_t*>(place.data));
  });
}

// --- Scores --------------------------------------------------------------------------------------

constexpr const char* kOp = "sparse.score";

struct PairList {
  std::vector<int64_t> query, doc;

  PairList(const TensorView& pairs, int64_t queries, int64_t docs) {
    expect(pairs, kOp, "pairs", {DType::i64}, 2);
    lists::expect_shape(pairs, kOp, "pairs", {pairs.shape[0], 2});
    copy(pairs, 0, queries, "query", query);
    copy(pairs, 1, docs, "doc", doc);
  }
  Pairs view() const { return {static_cast<int64_t>(query.size()), query.data(), doc.data()}; }

 private:
  static void copy(const TensorView& pairs, int64_t column, int64_t rows, const char* name,
                   std::vector<int64_t>& out) {
    const int64_t* from = static_cast<const int64_t*>(pairs.data) + column * pairs.strides[1];
    out.resize(pairs.shape[0]);
    for (size_t p = 0; p < out.size(); ++p) {
      out[p] = from[static_cast<int64_t>(p) * pairs.strides[0]];
      if (out[p] < 0 || out[p] >= rows)
        bad_value(kOp, "pairs have a " + std::string(name) + " " + std::to_string(out[p]) +
                           ", expected 0 to " + std::to_string(rows - 1) + ", of " +
                           std::to_string(rows) + " rows");
    }
  }
};

struct ScoreArguments {
  GivenArrays queries, docs;
  std::optional<PairList> pairs;
  DType dtype;

  ScoreArguments(const TensorView& q_indptr, const TensorView& q_indices,
                 const TensorView& q_values, const TensorView& d_indptr,
                 const TensorView& d_indices, const TensorView& d_values, const Optional& list,
                 int64_t columns)
      : queries(kOp, "queries", q_indptr, q_indices, q_values, columns),
        docs(kOp, "docs", d_indptr, d_indices, d_values, columns) {
    if (list) pairs.emplace(*list, queries.given.rows, docs.given.rows);
    dtype = q_values.dtype == DType::f64 ? DType::f64 : wide(d_values.dtype);
  }

  void inputs(Writes& writes) const {
    for (const GivenArrays* a : {&queries, &docs}) {
      writes.input(a->given.name, a->indices);
      writes.input(a->given.name, a->values);
    }
  }
  // Of the scores and of their gradient.
  void expect_scores(const TensorView& view, const char* name) const {
    if (pairs) expect_output(view, kOp, name, dtype, {pairs->view().count});
    else expect_output(view, kOp, name, dtype, {queries.given.rows, docs.given.rows});
  }
};

template <class T>
void run_forward(const ScoreArguments& a, void* out) {
  const CanonicalRows queries(a.queries.given, a.dtype), docs(a.docs.given, a.dtype);
  if (a.pairs)
    score_pairs(queries.rows<T>(), docs.rows<T>(), a.pairs->view(), static_cast<T*>(out));
  else score(queries.rows<T>(), docs.rows<T>(), static_cast<T*>(out));
}

template <class T>
void run_backward(const ScoreArguments& a, const void* d_out, void* d_queries, void* d_docs) {
  const CanonicalRows queries(a.queries.given, a.dtype), docs(a.docs.given, a.dtype);
  // A gradient of what the kernel sees, in the caller's memory where that is the same.
  Scratch<T> merged[2];
  const auto target = [&](const CanonicalRows& rows, void* out, Scratch<T>& own) {
    if (!out || rows.in_place()) return static_cast<T*>(out);
    own = Scratch<T>(rows.nnz());
    return own.get();
  };
  T* dq = target(queries, d_queries, merged[0]);
  T* dd = target(docs, d_docs, merged[1]);
  const T* g = static_cast<const T*>(d_out);
  if (a.pairs) score_pairs_backward(queries.rows<T>(), docs.rows<T>(), a.pairs->view(), g, dq, dd);
  else score_backward(queries.rows<T>(), docs.rows<T>(), g, dq, dd);
  if (d_queries) queries.to_caller(dq, static_cast<T*>(d_queries));
  if (d_docs) docs.to_caller(dd, static_cast<T*>(d_docs));
}

void bind_scores(py::module_& m) {
  m.def("sparse_score",
        [](const TensorView& q_indptr, const TensorView& q_indices, const TensorView& q_values,
           const TensorView& d_indptr, const TensorView& d_indices, const TensorView& d_values,
           const Optional& pairs, int64_t columns, const TensorView& out) {
          const ScoreArguments a(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values,
                                 pairs, columns);
          a.expect_scores(out, "out");
          Writes writes(kOp);
          a.inputs(writes);
          writes.output("out", out);
          writes.finish();
          py::gil_scoped_release release;
          if (a.dtype == DType::f64) run_forward<double>(a, out.data);
          else run_forward<float>(a, out.data);
        });
  m.def("sparse_score_backward",
        [](const TensorView& d_out, const TensorView& q_indptr, const TensorView& q_indices,
           const TensorView& q_values, const TensorView& d_indptr, const TensorView& d_indices,
           const TensorView& d_values, const Optional& pairs, int64_t columns,
           const Optional& d_queries, const Optional& d_docs) {
          const ScoreArguments a(q_indptr, q_indices, q_values, d_indptr, d_indices, d_values,
                                 pairs, columns);
          TensorView scores = d_out;
          scores.read_only = false;
          a.expect_scores(scores, "d_out");
          Writes writes(kOp);
          a.inputs(writes);
          writes.input("d_out", d_out);
          if (d_queries) {
            expect_output(*d_queries, kOp, "d_queries", a.dtype, {a.queries.given.nnz});
            writes.output("d_queries", *d_queries);
          }
          if (d_docs) {
            expect_output(*d_docs, kOp, "d_docs", a.dtype, {a.docs.given.nnz});
            writes.output("d_docs", *d_docs);
          }
          writes.finish();
          void* dq = d_queries ? d_queries->data : nullptr;
          void* dd = d_docs ? d_docs->data : nullptr;
          py::gil_scoped_release release;
          if (a.dtype == DType::f64) run_backward<double>(a, d_out.data, dq, dd);
          else run_backward<float>(a, d_out.data, dq, dd);
        });
}

}  // namespace

void bind_sparse_score(py::module_& m) {
  bind_rows(m);
  bind_scores(m);
}

}  // namespace pentad
