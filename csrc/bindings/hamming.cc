// SPDX-License-Identifier: Apache-2.0
// Checks arguments and hands views to the kernels. Outputs are allocated by the caller. Everything
// that could make a kernel read or write out of bounds is refused here, whoever calls.
#include "hamming/hamming.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "bindings/tensor_caster.h"
#include "hamming/hamming_cuda.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace hamming;
using Optional = std::optional<TensorView>;

Metric metric_from(const std::string& text, const char* op) {
  if (text == "hamming") return Metric::hamming;
  if (text == "jaccard") return Metric::jaccard;
  if (text == "and") return Metric::intersection;
  bad_value(op, "metric is '" + text + "', expected 'hamming', 'jaccard' or 'and'");
}

DType value_type(Metric metric) { return metric == Metric::jaccard ? DType::f32 : DType::i32; }

void check_bytes(int64_t bytes, const char* op) {
  if (bytes < 1 || bytes > kMaxBytes)
    bad_value(op, "codes have " + std::to_string(bytes) + " bytes per row, expected 1 to " +
                      std::to_string(kMaxBytes));
}

Matrix<const uint8_t> codes_of(const TensorView& view, const char* op, const char* name,
                               Device on = {}) {
  expect(view, op, name, {DType::u8}, 2, on);
  return matrix<const uint8_t>(view);
}

Matrix<const float> floats_of(const TensorView& x, const char* op, Device on = {}) {
  expect(x, op, "x", {DType::f32}, 2, on);
  return matrix<const float>(x);
}

void check_finite(const Matrix<const float>& x, const char* op) {
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < x.cols; ++j)
      if (!std::isfinite(x.row(i)[j * x.col_stride]))
        bad_value(op, "row " + std::to_string(i) + " of x holds a NaN or an infinity");
}

// (n) of a contiguous 1-D argument.
template <class T>
const T* column(const Optional& view, const char* op, const char* name, DType dtype, int64_t n,
                Device on = {}) {
  if (!view) return nullptr;
  expect(*view, op, name, {dtype}, 1, on);
  if (view->shape[0] != n)
    bad_value(op, std::string(name) + " has " + std::to_string(view->shape[0]) +
                      " entries, expected " + std::to_string(n));
  if (!is_contiguous(*view)) bad_value(op, std::string(name) + " is not contiguous");
  return static_cast<const T*>(view->data);
}

// uint16 (blocks, words, 32), contiguous, with room for `rows`.
Blocks blocks_of(const TensorView& view, int64_t rows, const char* op) {
  expect(view, op, "blocks", {DType::u16}, 3);
  if (view.shape[2] != kBlockRows || view.shape[1] % 4 || !is_contiguous(view))
    bad_value(op, "blocks have shape " + shape_text(view) + ", expected contiguous (n, 4 m, 32)");
  if (rows < 0 || rows > view.shape[0] * kBlockRows)
    bad_value(op, "rows is " + std::to_string(rows) + ", more than the blocks hold");
  return {static_cast<const uint16_t*>(view.data), nullptr, rows, view.shape[1]};
}

// Row-major uint8 codes (n, bytes), or blocks with `rows` valid rows. `bytes` is the queries'
// width.
Database database_of(const TensorView& view, int64_t rows, const Optional& ones,
                     const Optional& mask, const Optional& ids, int64_t bytes, Metric metric,
                     const char* op) {
  Database database;
  if (view.rank == 3) {
    database.blocks = blocks_of(view, rows, op);
    if (words_for(bytes) != database.blocks.words)
      bad_value(op, "queries have " + std::to_string(bytes) + " bytes per row but blocks have " +
                        std::to_string(database.blocks.words * 2));
    database.blocks.ones = column<uint16_t>(ones, op, "ones", DType::u16, rows);
    if (metric == Metric::jaccard && !database.blocks.ones) bad_value(op, "jaccard needs ones");
    // An empty block array has no address, which would read as "row-major".
    static const uint16_t nothing = 0;
    if (!database.blocks.data) database.blocks.data = &nothing;
  } else {
    database.codes = codes_of(view, op, "codes");
    if (database.codes.cols != bytes)
      bad_value(op, "queries have " + std::to_string(bytes) + " bytes per row but codes have " +
                        std::to_string(database.codes.cols));
  }
  check_bytes(bytes, op);
  database.mask = column<uint8_t>(mask, op, "mask", DType::boolean, database.rows());
  database.ids = column<int64_t>(ids, op, "ids", DType::i64, database.rows());
  return database;
}

Ranges ranges_of(const Optional& offsets, const Optional& begin, const Optional& end, int64_t nq,
                 const Database& database, const char* op) {
  Ranges ranges;
  ranges.offsets = column<int64_t>(offsets, op, "offsets", DType::i64, nq + 1);
  if (!ranges.offsets || !begin || !end || begin->rank != 1) bad_value(op, "incomplete ranges");
  const int64_t count = begin->shape[0];
  ranges.begin = column<int64_t>(begin, op, "begin", DType::i64, count);
  ranges.end = column<int64_t>(end, op, "end", DType::i64, count);
  bool fine = ranges.offsets[0] == 0 && ranges.offsets[nq] == count;
  for (int64_t q = 0; q < nq; ++q) fine = fine && ranges.offsets[q] <= ranges.offsets[q + 1];
  for (int64_t i = 0; i < count; ++i)
    fine = fine && ranges.begin[i] >= 0 && ranges.begin[i] % kBlockRows == 0 &&
           ranges.begin[i] <= ranges.end[i] && ranges.end[i] <= database.rows();
  if (!fine) bad_value(op, "ranges are out of order or out of bounds");
  return ranges;
}

void check_positions(const int64_t* positions, int64_t count, int64_t rows, int64_t lowest,
                     const char* op, const char* name) {
  for (int64_t i = 0; i < count; ++i)
    if (positions[i] < lowest || positions[i] >= rows)
      bad_value(op, std::string(name) + " holds " + std::to_string(positions[i]) +
                        ", but there are " + std::to_string(rows) + " rows");
}

// Offsets, in elements, of the rows that the last dimension's vectors form.
std::vector<int64_t> row_offsets(const TensorView& view) {
  std::vector<int64_t> offsets{0};
  for (int d = 0; d + 1 < view.rank; ++d) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * view.shape[d]);
    for (int64_t offset : offsets)
      for (int64_t i = 0; i < view.shape[d]; ++i) next.push_back(offset + i * view.strides[d]);
    offsets.swap(next);
  }
  return offsets;
}

Rows rows_of(const TensorView& view, const std::vector<int64_t>& offsets) {
  const int last = view.rank - 1;
  return {view.data,        view.dtype,        offsets.data(), static_cast<int64_t>(offsets.size()),
          view.shape[last], view.strides[last]};
}

// An output of the input's leading shape and `last` elements per row.
void expect_rows(const TensorView& out, const TensorView& in, int64_t last, DType dtype,
                 const char* op) {
  expect(out, op, "out", {dtype}, in.rank, device_of(in));
  if (out.read_only) bad_value(op, "out is read-only");
  bool fits = is_contiguous(out);
  for (int i = 0; i < out.rank; ++i)
    fits = fits && out.shape[i] == (i == out.rank - 1 ? last : in.shape[i]);
  if (!fits) bad_value(op, "out has shape " + shape_text(out) + " or strides that do not fit");
}

// The nearest number with this many bits of fraction and this least exponent: a threshold is
// compared in x's own type, as numpy and torch do.
double rounded(double x, int fraction_bits, int least_exponent, double largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), least_exponent) - fraction_bits);
  const double nearest = std::nearbyint(x / unit) * unit;
  return std::abs(nearest) > largest ? std::copysign(INFINITY, x) : nearest;
}

void py_pack(const TensorView& x, double threshold, const TensorView& out, uintptr_t stream) {
  constexpr const char* op = "hamming.pack";
  const Device on = device_of(x);
  expect(x, op, "x", {DType::f32, DType::f16, DType::bf16, DType::f64, DType::i8, DType::boolean},
         -1, on);
  if (x.rank < 1) bad_value(op, "x has no dimension to pack");
  expect_rows(out, x, (x.shape[x.rank - 1] + 7) / 8, DType::u8, op);
  if (x.dtype == DType::i8 || x.dtype == DType::boolean) threshold = std::floor(threshold);
  if (x.dtype == DType::f16) threshold = rounded(threshold, 10, -14, 65504.0);
  if (x.dtype == DType::bf16) threshold = rounded(threshold, 7, -126, 0x1.fep127);
  auto* codes = static_cast<uint8_t*>(out.data);
  int32_t nan = 0;
  if (runs_cuda(on)) {  // a device is not waited for to hear of a NaN
    cuda::pack(stream_of(on, stream), x, threshold, codes, on.is_cuda() ? nullptr : &nan);
  } else {
    const std::vector<int64_t> offsets = row_offsets(x);
    nan = !pack(rows_of(x, offsets), threshold, codes);
  }
  if (nan) bad_value(op, "x contains NaN, which is neither above nor below the threshold");
}

void py_unpack(const TensorView& codes, int64_t dim, const TensorView& out, uintptr_t stream) {
  constexpr const char* op = "hamming.unpack";
  const Device on = device_of(codes);
  expect(codes, op, "codes", {DType::u8}, -1, on);
  if (codes.rank < 1 || dim < 0 || codes.shape[codes.rank - 1] != (dim + 7) / 8)
    bad_value(
        op, "codes have shape " + shape_text(codes) + ", which is not dim " + std::to_string(dim));
  expect(out, op, "out", {DType::f32, DType::f64, DType::f16, DType::bf16, DType::i8}, -1, on);
  expect_rows(out, codes, dim, out.dtype, op);
  if (runs_cuda(on)) return cuda::unpack(stream_of(on, stream), codes, dim, out.dtype, out.data);
  const std::vector<int64_t> offsets = row_offsets(codes);
  unpack(rows_of(codes, offsets), dim, out.dtype, out.data);
}

void py_permute(const TensorView& codes, int64_t dim, int64_t shift, const TensorView& out,
                uintptr_t stream) {
  constexpr const char* op = "hamming.permute";
  const Device on = device_of(codes);
  expect(codes, op, "codes", {DType::u8}, -1, on);
  if (codes.rank < 1 || dim < 0 || codes.shape[codes.rank - 1] != (dim + 7) / 8)
    bad_value(
        op, "codes have shape " + shape_text(codes) + ", which is not dim " + std::to_string(dim));
  expect_rows(out, codes, (dim + 7) / 8, DType::u8, op);
  if (runs_cuda(on))
    return cuda::permute(stream_of(on, stream), codes, dim, shift, static_cast<uint8_t*>(out.data));
  const std::vector<int64_t> offsets = row_offsets(codes);
  permute(rows_of(codes, offsets), dim, shift, static_cast<uint8_t*>(out.data));
}

void py_distance(const TensorView& a, const TensorView& b, const std::string& metric_name,
                 const TensorView& out, const Optional& scratch, uintptr_t stream) {
  constexpr const char* op = "hamming.distance";
  const Metric metric = metric_from(metric_name, op);
  const Device on = device_of(a);
  const Matrix<const uint8_t> left = codes_of(a, op, "a", on), right = codes_of(b, op, "b", on);
  if (left.cols != right.cols)
    bad_value(op, "a has " + std::to_string(left.cols) + " bytes per row but b has " +
                      std::to_string(right.cols));
  check_bytes(left.cols, op);
  expect_output(out, op, "out", value_type(metric), {left.rows, right.rows}, on);
  if (!runs_cuda(on)) return distance(left, right, metric, out.data);
  const int64_t bytes = cuda::distance_scratch(left.rows, right.rows);
  cuda::distance(stream_of(on, stream), left, right, metric, out.data,
                 scratch_of(scratch, op, bytes, on));
}

// --- On a device, over row-major codes ---------------------------------------------------------------

void expect_cuda(Device on, const char* op) {
  if (!runs_cuda(on)) throw DeviceMismatch("[" + std::string(op) + "] queries are not on a device");
}

// The rows that a query of this many bytes is compared with.
Matrix<const uint8_t> searched_codes(const TensorView& view, int64_t bytes, const char* op,
                                     Device on) {
  const Matrix<const uint8_t> codes = codes_of(view, op, "codes", on);
  if (codes.cols != bytes)
    bad_value(op, "queries have " + std::to_string(bytes) + " bytes per row but codes have " +
                      std::to_string(codes.cols));
  check_bytes(bytes, op);
  if (codes.rows > cuda::kMaxRows)
    bad_value(op, "codes have " + std::to_string(codes.rows) + " rows, a device takes " +
                      std::to_string(cuda::kMaxRows));
  return codes;
}

int64_t listed_k(const TensorView& values, const char* op) {
  const int64_t k = values.rank == 2 ? values.shape[1] : 0;
  if (k > cuda::kMaxK)
    bad_value(op, "k is " + std::to_string(k) + ", the CUDA kernel takes at most " +
                      std::to_string(cuda::kMaxK));
  return k;
}

void py_topk_cuda(const TensorView& queries, const TensorView& codes_view, const Optional& mask,
                  const std::string& metric_name, const TensorView& values,
                  const TensorView& out_ids, const Optional& scratch, uintptr_t stream) {
  constexpr const char* op = "hamming.topk";
  const Metric metric = metric_from(metric_name, op);
  const Device on = device_of(queries);
  expect_cuda(on, op);
  const Matrix<const uint8_t> q = codes_of(queries, op, "queries", on);
  const Matrix<const uint8_t> codes = searched_codes(codes_view, q.cols, op, on);
  const auto* live = column<uint8_t>(mask, op, "mask", DType::boolean, codes.rows, on);
  const int64_t k = listed_k(values, op);
  expect_output(values, op, "values", value_type(metric), {q.rows, k}, on);
  expect_output(out_ids, op, "ids", DType::i64, {q.rows, k}, on);
  const int64_t bytes = cuda::topk_scratch(q.rows, codes.rows, k);
  cuda::topk(stream_of(on, stream), q, codes, live, metric, k, values.data,
             static_cast<int64_t*>(out_ids.data), scratch_of(scratch, op, bytes, on));
}

// The same, of the rows of some lists per query.
void py_topk_lists_cuda(const TensorView& queries, const TensorView& codes_view,
                        const TensorView& probes, const TensorView& borders,
                        const TensorView& ids_of, const Optional& mask,
                        const std::string& metric_name, const TensorView& values,
                        const TensorView& out_ids, const Optional& scratch, uintptr_t stream) {
  constexpr const char* op = "hamming.topk_lists";
  const Metric metric = metric_from(metric_name, op);
  const Device on = device_of(queries);
  expect_cuda(on, op);
  const Matrix<const uint8_t> q = codes_of(queries, op, "queries", on);
  const Matrix<const uint8_t> codes = searched_codes(codes_view, q.cols, op, on);
  const auto* live = column<uint8_t>(mask, op, "mask", DType::boolean, codes.rows, on);
  expect(probes, op, "probes", {DType::i64}, 2, on);
  if (probes.shape[0] != q.rows || !is_contiguous(probes))
    bad_value(op, "probes have shape " + shape_text(probes) + ", expected contiguous (" +
                      std::to_string(q.rows) + ", lists)");
  const int64_t lists = borders.rank == 1 ? borders.shape[0] - 1 : 0;
  if (lists < 1 || probes.shape[1] < 1) bad_value(op, "borders have shape " + shape_text(borders));
  const cuda::Visits visits{static_cast<const int64_t*>(probes.data), probes.shape[1], lists,
                            column<int64_t>(borders, op, "borders", DType::i64, lists + 1, on),
                            column<int64_t>(ids_of, op, "ids_of", DType::i64, codes.rows, on)};
  const int64_t k = listed_k(values, op);
  expect_output(values, op, "values", value_type(metric), {q.rows, k}, on);
  expect_output(out_ids, op, "ids", DType::i64, {q.rows, k}, on);
  const int64_t bytes = cuda::topk_lists_scratch(q.rows, visits.count, codes.rows, lists, k);
  cuda::topk_lists(stream_of(on, stream), q, codes, visits, live, metric, k, values.data,
                   static_cast<int64_t*>(out_ids.data), scratch_of(scratch, op, bytes, on));
}

void py_topk_score_cuda(const TensorView& x, const TensorView& codes_view, const Optional& mask,
                        const TensorView& values, const TensorView& out_ids,
                        const Optional& scratch, uintptr_t stream) {
  constexpr const char* op = "hamming.topk_score";
  const Device on = device_of(x);
  expect_cuda(on, op);
  const Matrix<const float> queries = floats_of(x, op, on);
  if (queries.cols < 1) bad_value(op, "x has no columns");
  // Numbers on the CPU, where the kernels are tested, are looked through as its own kernels do.
  if (!on.is_cuda()) check_finite(queries, op);
  const auto codes = searched_codes(codes_view, (queries.cols + 7) / 8, op, on);
  const auto* live = column<uint8_t>(mask, op, "mask", DType::boolean, codes.rows, on);
  const int64_t k = listed_k(values, op);
  expect_output(values, op, "values", DType::f32, {queries.rows, k}, on);
  expect_output(out_ids, op, "ids", DType::i64, {queries.rows, k}, on);
  const int64_t bytes = cuda::topk_score_scratch(queries.rows, codes.rows, k);
  cuda::topk_score(stream_of(on, stream), queries, codes, live, k, static_cast<float*>(values.data),
                   static_cast<int64_t*>(out_ids.data), scratch_of(scratch, op, bytes, on));
}

// The two passes of a range search: `indptr` for the first, `values` and `ids` for the second.
void py_range_cuda(const TensorView& queries, const TensorView& codes_view, const Optional& mask,
                   const std::string& metric_name, double radius, const Optional& indptr,
                   const Optional& values, const Optional& ids, const Optional& scratch,
                   uintptr_t stream_number) {
  constexpr const char* op = "hamming.range_search";
  const Metric metric = metric_from(metric_name, op);
  const Device on = device_of(queries);
  expect_cuda(on, op);
  const Matrix<const uint8_t> q = codes_of(queries, op, "queries", on);
  const Matrix<const uint8_t> codes = searched_codes(codes_view, q.cols, op, on);
  const auto* live = column<uint8_t>(mask, op, "mask", DType::boolean, codes.rows, on);
  const uint32_t limit = radius_limit(metric, radius);
  const CudaStream stream = stream_of(on, stream_number);
  void* memory = scratch_of(scratch, op, cuda::range_scratch(q.rows, codes.rows), on);
  if (indptr) {
    expect_output(*indptr, op, "indptr", DType::i64, {q.rows + 1}, on);
    return cuda::range_count(stream, q, codes, live, metric, limit,
                             static_cast<int64_t*>(indptr->data), memory);
  }
  if (!values || !ids) bad_value(op, "there is neither indptr nor values with ids");
  const int64_t total = values->rank == 1 ? values->shape[0] : 0;
  expect_output(*values, op, "values", value_type(metric), {total}, on);
  expect_output(*ids, op, "ids", DType::i64, {total}, on);
  cuda::range_write(stream, q, codes, live, metric, limit, total, values->data,
                    static_cast<int64_t*>(ids->data), memory);
}

// --- On the CPU, over row-major codes or blocks ------------------------------------------------------

void py_topk(const TensorView& queries, const TensorView& database_view, int64_t rows,
             const Optional& ones, const Optional& mask, const Optional& ids,
             const Optional& offsets, const Optional& begin, const Optional& end,
             const std::string& metric_name, const TensorView& values, const TensorView& out_ids) {
  constexpr const char* op = "hamming.topk";
  const Metric metric = metric_from(metric_name, op);
  const Matrix<const uint8_t> q = codes_of(queries, op, "queries");
  const Database database = database_of(database_view, rows, ones, mask, ids, q.cols, metric, op);
  const int64_t k = values.rank == 2 ? values.shape[1] : 0;
  expect_output(values, op, "values", value_type(metric), {q.rows, k});
  expect_output(out_ids, op, "ids", DType::i64, {q.rows, k});
  int64_t* found = static_cast<int64_t*>(out_ids.data);
  if (!offsets) return topk(q, database, metric, k, values.data, found);
  topk_ranges(q, database, ranges_of(offsets, begin, end, q.rows, database, op), metric, k,
              values.data, found);
}

std::unique_ptr<RangeResult> py_range(const TensorView& queries, const TensorView& database_view,
                                      int64_t rows, const Optional& ones, const Optional& mask,
                                      const Optional& ids, const Optional& offsets,
                                      const Optional& begin, const Optional& end,
                                      const std::string& metric_name, double radius) {
  constexpr const char* op = "hamming.range_search";
  const Metric metric = metric_from(metric_name, op);
  const Matrix<const uint8_t> q = codes_of(queries, op, "queries");
  const Database database = database_of(database_view, rows, ones, mask, ids, q.cols, metric, op);
  if (!offsets) return std::make_unique<RangeResult>(q, database, metric, radius);
  return std::make_unique<RangeResult>(
      q, database, ranges_of(offsets, begin, end, q.rows, database, op), metric, radius);
}

void py_score(const TensorView& x, const TensorView& codes, const TensorView& out,
              uintptr_t stream) {
  constexpr const char* op = "hamming.score";
  const Device on = device_of(x);
  const Matrix<const float> queries = floats_of(x, op, on);
  const Matrix<const uint8_t> c = codes_of(codes, op, "codes", on);
  if (queries.cols < 1 || c.cols != (queries.cols + 7) / 8)
    bad_value(op, "codes have " + std::to_string(c.cols) + " bytes per row, which is not dim " +
                      std::to_string(queries.cols));
  expect_output(out, op, "out", DType::f32, {queries.rows, c.rows}, on);
  if (runs_cuda(on)) cuda::score(stream_of(on, stream), queries, c, static_cast<float*>(out.data));
  else score(queries, c, static_cast<float*>(out.data));
}

void py_topk_score(const TensorView& x, const TensorView& database_view, int64_t rows,
                   const Optional& mask, const Optional& ids, const TensorView& values,
                   const TensorView& out_ids) {
  constexpr const char* op = "hamming.topk_score";
  const Matrix<const float> queries = floats_of(x, op);
  if (queries.cols < 1) bad_value(op, "x has no columns");
  const Database database = database_of(database_view, rows, std::nullopt, mask, ids,
                                        (queries.cols + 7) / 8, Metric::hamming, op);
  check_finite(queries, op);
  const int64_t k = values.rank == 2 ? values.shape[1] : 0;
  expect_output(values, op, "values", DType::f32, {queries.rows, k});
  expect_output(out_ids, op, "ids", DType::i64, {queries.rows, k});
  topk_score(queries, database, k, static_cast<float*>(values.data),
             static_cast<int64_t*>(out_ids.data));
}

WeightedSum weighted_sum_of(const TensorView& weights, const TensorView& codes, int64_t dim) {
  WeightedSum in;
  in.weights = static_cast<const float*>(weights.data);
  in.codes = static_cast<const uint8_t*>(codes.data);
  for (int i = 0; i < 3; ++i) {
    in.weight_strides[i] = weights.strides[i];
    in.code_strides[i] = codes.strides[i];
  }
  in.batch = weights.shape[0];
  in.nq = weights.shape[1];
  in.n = weights.shape[2];
  in.dim = dim;
  return in;
}

void py_weighted_sum(const TensorView& weights, const TensorView& codes, int64_t dim,
                     const TensorView& out, const Optional& scratch, uintptr_t stream) {
  constexpr const char* op = "hamming.weighted_sum";
  const Device on = device_of(weights);
  expect(weights, op, "weights", {DType::f32}, 3, on);
  expect(codes, op, "codes", {DType::u8}, 3, on);
  if (weights.shape[0] != codes.shape[0] || weights.shape[2] != codes.shape[1])
    bad_value(op,
              "weights have shape " + shape_text(weights) + " but codes have " + shape_text(codes));
  if (dim < 1 || codes.shape[2] != (dim + 7) / 8)
    bad_value(op, "codes have " + std::to_string(codes.shape[2]) +
                      " bytes per row, which is not dim " + std::to_string(dim));
  expect_output(out, op, "out", DType::f32, {weights.shape[0], weights.shape[1], dim}, on);
  const WeightedSum in = weighted_sum_of(weights, codes, dim);
  if (!runs_cuda(on)) return weighted_sum(in, static_cast<float*>(out.data));
  cuda::weighted_sum(
      stream_of(on, stream), in, static_cast<float*>(out.data),
      scratch_of(scratch, op, cuda::weighted_sum_scratch(in.batch, in.nq, in.n, dim), on));
}

void py_to_blocks(const TensorView& codes, int64_t first, const TensorView& blocks,
                  const Optional& ones) {
  constexpr const char* op = "hamming.to_blocks";
  const Matrix<const uint8_t> c = codes_of(codes, op, "codes");
  const Blocks target = blocks_of(blocks, 0, op);
  if (blocks.read_only) bad_value(op, "blocks are read-only");
  if (words_for(c.cols) != target.words) bad_value(op, "codes do not fit the blocks");
  if (first < 0 || first > blocks.shape[0] * kBlockRows - c.rows)
    bad_value(op, "the blocks have no room for these rows");
  uint16_t* counts = nullptr;
  if (ones) {
    expect_output(*ones, op, "ones", DType::u16, {ones->rank == 1 ? ones->shape[0] : 0});
    if (first > ones->shape[0] - c.rows) bad_value(op, "ones is too short");
    counts = static_cast<uint16_t*>(ones->data);
  }
  to_blocks(c, static_cast<uint16_t*>(blocks.data), counts, first, target.words);
}

void py_from_blocks(const TensorView& blocks, int64_t rows, const TensorView& positions,
                    const TensorView& out) {
  constexpr const char* op = "hamming.from_blocks";
  const Blocks source = blocks_of(blocks, rows, op);
  expect(positions, op, "positions", {DType::i64}, 1);
  const int64_t count = positions.shape[0];
  const int64_t* p = column<int64_t>(positions, op, "positions", DType::i64, count);
  check_positions(p, count, rows, 0, op, "positions");
  const int64_t bytes = out.rank == 2 ? out.shape[1] : 0;
  expect_output(out, op, "out", DType::u8, {count, bytes});
  if (words_for(bytes) != source.words) bad_value(op, "out does not fit the blocks");
  from_blocks(source, p, count, matrix<uint8_t>(out));
}

// On a device a kernel passes over what is no row.
const int64_t* candidates_of(const TensorView& candidates, int64_t nq, int64_t rows, const char* op,
                             Device on) {
  expect(candidates, op, "candidates", {DType::i64}, 2, on);
  const int64_t c = candidates.shape[1];
  if (candidates.shape[0] != nq || !is_contiguous(candidates))
    bad_value(op, "candidates have shape " + shape_text(candidates) + ", expected contiguous (" +
                      std::to_string(nq) + ", c)");
  const int64_t* p = static_cast<const int64_t*>(candidates.data);
  if (!on.is_cuda())
    check_positions(p, nq * c, rows, std::numeric_limits<int64_t>::min(), op, "candidates");
  return p;
}

// Of blocks (n, words, 32) with `rows` rows, or for a CUDA kernel of row-major codes (rows, bytes).
void py_score_candidates(const TensorView& x, const TensorView& database, int64_t rows,
                         const TensorView& candidates, const TensorView& out, uintptr_t stream) {
  constexpr const char* op = "hamming.score_candidates";
  const Device on = device_of(x);
  const Matrix<const float> queries = floats_of(x, op, on);
  const auto* p = candidates_of(candidates, queries.rows, rows, op, on);
  const int64_t bytes = (queries.cols + 7) / 8, c = candidates.shape[1];
  expect_output(out, op, "out", DType::f32, {queries.rows, c}, on);
  auto* scores = static_cast<float*>(out.data);
  if (runs_cuda(on, database.rank == 2, op, "blocks")) {
    const Matrix<const uint8_t> codes = codes_of(database, op, "codes", on);
    if (codes.cols != bytes || codes.rows != rows) bad_value(op, "x does not fit the codes");
    return cuda::score_candidates(stream_of(on, stream), queries, codes, p, c, scores);
  }
  const Blocks source = blocks_of(database, rows, op);
  if (words_for(bytes) != source.words) bad_value(op, "x does not fit the blocks");
  score_candidates(queries, source, p, c, scores);
}

void py_dot_candidates(const TensorView& x, const TensorView& vectors, const Optional& scale,
                       const TensorView& candidates, const TensorView& out, uintptr_t stream) {
  constexpr const char* op = "hamming.dot_candidates";
  const Device on = device_of(x);
  const Matrix<const float> queries = floats_of(x, op, on);
  expect(vectors, op, "vectors", {DType::i8, DType::f16}, 2, on);
  const int64_t rows = vectors.shape[0], dim = vectors.shape[1], c = candidates.shape[1];
  if (dim != queries.cols || !is_contiguous(vectors))
    bad_value(op, "vectors have shape " + shape_text(vectors) + ", expected contiguous (n, " +
                      std::to_string(queries.cols) + ")");
  const float* scales = column<float>(scale, op, "scale", DType::f32, rows, on);
  if (vectors.dtype == DType::i8 && !scale) bad_value(op, "int8 vectors need a scale");
  const auto* p = candidates_of(candidates, queries.rows, rows, op, on);
  expect_output(out, op, "out", DType::f32, {queries.rows, c}, on);
  auto* scores = static_cast<float*>(out.data);
  if (runs_cuda(on))
    cuda::dot_candidates(stream_of(on, stream), queries, vectors.data, vectors.dtype, scales, rows,
                         p, c, scores);
  else dot_candidates(queries, vectors.data, vectors.dtype, scales, p, c, scores);
}

}  // namespace

void bind_hamming(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.attr("hamming_block_rows") = kBlockRows;
  m.attr("hamming_max_bytes") = kMaxBytes;
  m.def("hamming_words", [](int64_t bytes) { return words_for(bytes); });

  const auto no_scratch = py::arg("scratch") = py::none(), default_stream = py::arg("stream") = 0;
  const auto codes = py::arg("codes"), dim = py::arg("dim"), out = py::arg("out"), x = py::arg("x"),
             candidates = py::arg("candidates");
  m.def("hamming_pack", &py_pack, x, py::arg("threshold"), out, default_stream, release);
  m.def("hamming_unpack", &py_unpack, codes, dim, out, default_stream, release);
  m.def("hamming_permute", &py_permute, codes, dim, py::arg("shift"), out, default_stream, release);
  m.def("hamming_distance", &py_distance, py::arg("a"), py::arg("b"), py::arg("metric"), out,
        no_scratch, default_stream, release);
  m.def("hamming_topk", &py_topk, release);
  m.def("hamming_topk_cuda", &py_topk_cuda, release);
  m.def("hamming_topk_lists_cuda", &py_topk_lists_cuda, release);
  m.def("hamming_topk_lists_scratch", &cuda::topk_lists_scratch);
  m.def("hamming_topk_score_cuda", &py_topk_score_cuda, release);
  m.def("hamming_range_cuda", &py_range_cuda, release);
  m.attr("hamming_cuda_max_k") = cuda::kMaxK;
  m.def("hamming_distance_scratch", &cuda::distance_scratch);
  m.def("hamming_topk_scratch", &cuda::topk_scratch);
  m.def("hamming_topk_score_scratch", &cuda::topk_score_scratch);
  m.def("hamming_range_scratch", &cuda::range_scratch);
  m.def("hamming_weighted_sum_scratch", &cuda::weighted_sum_scratch);
  m.def("hamming_range", &py_range, release);
  m.def("hamming_score", &py_score, x, codes, out, default_stream, release);
  m.def("hamming_topk_score", &py_topk_score, release);
  m.def("hamming_weighted_sum", &py_weighted_sum, py::arg("weights"), codes, dim, out, no_scratch,
        default_stream, release);
  m.def("hamming_to_blocks", &py_to_blocks, release);
  m.def("hamming_from_blocks", &py_from_blocks, release);
  m.def("hamming_score_candidates", &py_score_candidates, x, py::arg("database"), py::arg("rows"),
        candidates, out, default_stream, release);
  m.def("hamming_dot_candidates", &py_dot_candidates, x, py::arg("vectors"), py::arg("scale"),
        candidates, out, default_stream, release);

  py::class_<RangeResult>(m, "HammingRange")
      .def_property_readonly("total", &RangeResult::total)
      .def(
          "write",
          [](const RangeResult& result, const TensorView& indptr, const TensorView& values,
             const TensorView& ids) {
            constexpr const char* op = "hamming.range_search";
            expect_output(indptr, op, "indptr", DType::i64, {result.queries() + 1});
            expect_output(values, op, "values", value_type(result.metric()), {result.total()});
            expect_output(ids, op, "ids", DType::i64, {result.total()});
            result.write(static_cast<int64_t*>(indptr.data), values.data,
                         static_cast<int64_t*>(ids.data));
          },
          release);
}

}  // namespace pentad
