// SPDX-License-Identifier: Apache-2.0
// Checks the arguments of pq/assign.h and pq/kmeans.h. Outputs are allocated by the caller.
#include "pq/assign.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/tensor_caster.h"
#include "common/reals.h"
#include "pq/assign_cuda.h"
#include "pq/kmeans.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace pq;
using Optional = std::optional<TensorView>;

Nearest metric_from(const std::string& text, const char* op) {
  if (text == "l2") return Nearest::l2;
  if (text == "ip") return Nearest::ip;
  if (text == "cosine") return Nearest::cosine;
  bad_value(op, "metric is '" + text + "', expected 'l2', 'ip' or 'cosine'");
}

Array3 array3(const TensorView& view, const char* op, const char* name, Device on = {}) {
  expect(view, op, name, {DType::f32, DType::f16, DType::bf16, DType::f64}, 3, on);
  Array3 array{view.data, view.dtype, {}, {}};
  for (int d = 0; d < 3; ++d) array.shape[d] = view.shape[d], array.strides[d] = view.strides[d];
  return array;
}

bool is_finite(const Array3& a) {
  for (int64_t i = 0; i < a.shape[0]; ++i)
    for (int64_t m = 0; m < a.shape[1]; ++m)
      for (int64_t j = 0; j < a.shape[2]; ++j)
        if (!std::isfinite(
                read_real(a.data, a.dtype, i * a.strides[0] + m * a.strides[1] + j * a.strides[2])))
          return false;
  return true;
}

// By the CUDA kernels. Contents are looked at where that needs no wait.
Verdict assign_cuda(Device on, uintptr_t stream, const Array3& x, const Array3& books,
                    Nearest metric, const Assigned& out, void* scratch) {
  if (!on.is_cuda() && !is_finite(books)) return Verdict::bad_centroids;
  if (!on.is_cuda() && !is_finite(x)) return Verdict::bad_vectors;
  pq::cuda::assign(stream_of(on, stream), x, books, metric, out, scratch);
  return Verdict::fine;
}

// x (n, M, dsub), codebooks (M, K, dsub), codes (n, M, top) uint8 or int32, distances the same.
void assign_py(const TensorView& x, const TensorView& codebooks, const std::string& metric,
               const TensorView& codes, const Optional& distances, const Optional& scratch,
               uintptr_t stream) {
  const char* op = "pq.assign";
  const Device on = device_of(x);
  const Nearest nearest = metric_from(metric, op);
  const Array3 vectors = array3(x, op, "x", on), books = array3(codebooks, op, "codebooks", on);
  const bool wide_floats = vectors.dtype == DType::f64 || books.dtype == DType::f64;
  const bool cuda =
      runs_cuda(on, !wide_floats, op, "float64") && (on.is_cuda() || scratch.has_value());
  if (books.shape[0] != vectors.shape[1] || books.shape[2] != vectors.shape[2])
    bad_value(op, "codebooks have shape " + shape_text(codebooks) + " but x " + shape_text(x));
  if (books.shape[1] < 1 || books.shape[1] > kMostCentroids)
    bad_value(op, "codebooks have " + std::to_string(books.shape[1]) +
                      " centroids, expected 1 to " + std::to_string(kMostCentroids));
  if (books.shape[2] < 1 || books.shape[2] > kMostAssignDim)
    bad_value(op, "codebooks have " + std::to_string(books.shape[2]) +
                      " dimensions, expected 1 to " + std::to_string(kMostAssignDim));
  const bool wide = books.shape[1] > 256 || codes.dtype == DType::i32;
  if (codes.rank != 3)
    bad_value(op, "codes have shape " + shape_text(codes) + ", expected (n, M, top)");
  const int64_t top = codes.shape[2];
  if (top < 1 || top > books.shape[1])
    bad_value(
        op, "top is " + std::to_string(top) + ", expected 1 to " + std::to_string(books.shape[1]));
  const auto shape = {vectors.shape[0], vectors.shape[1], top};
  expect_output(codes, op, "codes", wide ? DType::i32 : DType::u8, shape, on);
  if (distances) expect_output(*distances, op, "distances", DType::f32, shape, on);
  void* memory = nullptr;
  if (cuda) {
    const int64_t bytes = pq::cuda::assign_scratch(vectors.shape[0], books.shape[0], books.shape[1],
                                                   books.shape[2], top);
    memory = scratch_of(scratch, op, bytes, on);
  }
  const Assigned out{codes.data, wide, top,
                     distances ? static_cast<float*>(distances->data) : nullptr};
  Verdict verdict;
  {
    py::gil_scoped_release release;
    verdict = cuda ? assign_cuda(on, stream, vectors, books, nearest, out, memory)
                   : pq::assign(vectors, books, nearest, out);
  }
  if (verdict == Verdict::bad_vectors) bad_value(op, "x contains NaN or infinity");
  if (verdict == Verdict::bad_centroids) bad_value(op, "codebooks contain NaN or infinity");
}

// x (n, M, dsub) float32, centroids (M, k, dsub).
Clustering clustering(const TensorView& x, const TensorView& centroids, const char* op) {
  expect(x, op, "x", {DType::f32}, 3);
  expect(centroids, op, "centroids", {DType::f32}, 3);
  const int64_t k = centroids.shape[1];
  expect_output(centroids, op, "centroids", DType::f32, {x.shape[1], k, x.shape[2]});
  if (k < 1 || k > kMostCentroids || k > x.shape[0])
    bad_value(op, "k is " + std::to_string(k) + ", but there are " + std::to_string(x.shape[0]) +
                      " rows; at most " + std::to_string(kMostCentroids) + " are supported");
  if (x.shape[2] < 1 || x.shape[2] > kMostAssignDim)
    bad_value(op, "x has " + std::to_string(x.shape[2]) + " dimensions, expected 1 to " +
                      std::to_string(kMostAssignDim));
  return {array3(x, op, "x"), k, static_cast<float*>(centroids.data)};
}

void kmeans_start_py(const TensorView& x, uint64_t seed, const TensorView& centroids) {
  const Clustering c = clustering(x, centroids, "pq.kmeans");
  py::gil_scoped_release release;
  kmeans_start(c, seed);
}

// codes (M, n) int32, before (M, k, dim) or None; whether nothing changed any more.
bool kmeans_steps_py(const TensorView& x, const std::string& metric, int64_t iterations,
                     const TensorView& centroids, const TensorView& codes, const Optional& before) {
  const char* op = "pq.kmeans";
  const Nearest nearest = metric_from(metric, op);
  Clustering c = clustering(x, centroids, op);
  expect_output(codes, op, "codes", DType::i32, {x.shape[1], x.shape[0]});
  if (before) {
    expect_output(*before, op, "before", DType::f32,
                  {centroids.shape[0], centroids.shape[1], centroids.shape[2]});
    if (nearest != Nearest::l2) bad_value(op, "only metric 'l2' is accelerated");
    c.before = static_cast<float*>(before->data);
  }
  std::vector<uint8_t> stable(x.shape[1]);
  bool finite;
  {
    py::gil_scoped_release release;
    finite = kmeans_steps(c, nearest, iterations, static_cast<int32_t*>(codes.data), stable.data());
  }
  if (!finite) bad_value(op, "x contains NaN or infinity");
  return std::all_of(stable.begin(), stable.end(), [](uint8_t s) { return s != 0; });
}

}  // namespace

void bind_pq_assign(py::module_& m) {
  m.def("pq_assign", assign_py, py::arg("x"), py::arg("codebooks"), py::arg("metric"),
        py::arg("codes"), py::arg("distances"), py::arg("scratch") = py::none(),
        py::arg("stream") = 0);
  m.def("pq_assign_scratch", &pq::cuda::assign_scratch);
  m.def("pq_kmeans_start", kmeans_start_py, py::arg("x"), py::arg("seed"), py::arg("centroids"));
  m.def("pq_kmeans_steps", kmeans_steps_py, py::arg("x"), py::arg("metric"), py::arg("iterations"),
        py::arg("centroids"), py::arg("codes"), py::arg("before") = py::none());
}

}  // namespace pentad
