// SPDX-License-Identifier: Apache-2.0
// Checks arguments of the search over codes. Everything that could make a kernel read or write out
// of bounds is refused here, whoever calls.
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "bindings/lists.h"
#include "bindings/tensor_caster.h"
#include "pq/code_scan.h"
#include "pq/rescore.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace pq;
using Optional = std::optional<TensorView>;

constexpr int64_t kMostRows = int64_t{1} << 56;  // sums of two such numbers do not overflow

Layout layout_of(int nbits, int64_t subspaces, const char* op) {
  if (nbits != 4 && nbits != 6 && nbits != 8)
    bad_value(op, "nbits is " + std::to_string(nbits) + ", expected 4, 6 or 8");
  if (subspaces < 1 || subspaces > kMaxSubspaces)
    bad_value(op, "M is " + std::to_string(subspaces) + ", expected 1 to " +
                      std::to_string(kMaxSubspaces));
  return {nbits, subspaces};
}

std::vector<int64_t> block_shape(const Layout& layout) {
  if (layout.nbits == 4) return {layout.groups(), kBlockRows, 4};
  return {layout.subspaces, kBlockRows};
}

// uint8 (n, *block_shape), contiguous, with room for `rows`.
void check_blocks(const TensorView& view, const Layout& layout, int64_t rows, const char* op) {
  const std::vector<int64_t> shape = block_shape(layout);
  expect(view, op, "blocks", {DType::u8}, static_cast<int>(shape.size()) + 1);
  bool fits = is_contiguous(view);
  for (size_t i = 0; i < shape.size(); ++i) fits = fits && view.shape[i + 1] == shape[i];
  if (!fits)
    bad_value(op, "blocks have shape " + shape_text(view) + ", which does not fit M " +
                      std::to_string(layout.subspaces) + " and nbits " +
                      std::to_string(layout.nbits) + ", or are not contiguous");
  if (rows < 0 || rows > view.shape[0] * kBlockRows)
    bad_value(op, "rows is " + std::to_string(rows) + ", more than the blocks hold");
}

Blocks blocks_of(const TensorView& view, const Layout& layout, int64_t rows, const char* op) {
  check_blocks(view, layout, rows, op);
  return {static_cast<const uint8_t*>(view.data), layout, rows};
}

template <class T>
const T* column(const Optional& view, const char* op, const char* name, DType dtype, int64_t n) {
  if (!view) return nullptr;
  expect(*view, op, name, {dtype}, 1);
  lists::expect_shape(*view, op, name, {n});
  if (!is_contiguous(*view)) bad_value(op, std::string(name) + " is not contiguous");
  static const T nothing{};
  return n ? static_cast<const T*>(view->data) : &nothing;
}

void expect_finite(const float* x, int64_t n, const char* op, const char* name) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::isfinite(x[i]);
  if (!finite) bad_value(op, std::string(name) + " hold a NaN or an infinity");
}

// The arguments of a search, checked; ranges are copied first, as arrays may change meanwhile.
struct Arguments {
  Queries queries;
  Database database;
  Ranges ranges;
  bool has_ranges = false;
  std::vector<int64_t> offsets, begin, end, table;

  Arguments(const TensorView& tables, const Optional& offset, const TensorView& blocks, int nbits,
            int64_t subspaces, int64_t rows, const Optional& scale, const Optional& bias,
            const Optional& mask, const Optional& ids, const Optional& range_offsets,
            const Optional& range_begin, const Optional& range_end, const Optional& range_table,
            const Optional& range_offset, const char* op) {
    const Layout layout = layout_of(nbits, subspaces, op);
    database.blocks = blocks_of(blocks, layout, rows, op);
    database.scale = column<float>(scale, op, "scale", DType::f32, rows);
    database.bias = column<float>(bias, op, "bias", DType::f32, rows);
    if (scale && !bias) bad_value(op, "scale goes with bias");
    database.mask = column<uint8_t>(mask, op, "mask", DType::boolean, rows);
    database.ids = column<int64_t>(ids, op, "ids", DType::i64, rows);
    if (bias) expect_finite(database.bias, rows, op, "bias");
    if (scale) expect_finite(database.scale, rows, op, "scale");
    for (int64_t i = 0; scale && i < rows; ++i)
      if (database.scale[i] < 0) bad_value(op, "scale holds a negative number");

    expect(tables, op, "tables", {DType::f32}, 3);
    if (!is_contiguous(tables)) bad_value(op, "tables are not contiguous");
    if (tables.shape[1] < 1 || tables.shape[1] > subspaces || tables.shape[2] != layout.entries())
      bad_value(op, "tables have shape " + shape_text(tables) + ", expected (any, 1 to " +
                        std::to_string(subspaces) + ", " + std::to_string(layout.entries()) + ")");
    queries.tables = static_cast<const float*>(tables.data);
    queries.count = tables.shape[0];
    queries.used = tables.shape[1];
    expect_finite(queries.tables, tables.shape[0] * tables.shape[1] * tables.shape[2], op,
                  "tables");
    has_ranges = range_offsets.has_value();
    if (!has_ranges) {
      queries.offset = column<float>(offset, op, "offset", DType::f32, queries.count);
      if (queries.offset) expect_finite(queries.offset, queries.count, op, "offset");
      return;
    }
    if (!range_begin || !range_end) bad_value(op, "incomplete ranges");
    offsets = lists::integers(*range_offsets, op, "range_offsets");
    begin = lists::integers(*range_begin, op, "range_begin");
    end = lists::integers(*range_end, op, "range_end");
    const auto count = static_cast<int64_t>(begin.size());
    bool fine = !offsets.empty() && offsets.front() == 0 && offsets.back() == count &&
                static_cast<int64_t>(end.size()) == count;
    for (size_t q = 1; q < offsets.size(); ++q) fine = fine && offsets[q - 1] <= offsets[q];
    for (int64_t i = 0; fine && i < count; ++i)
      fine = begin[i] >= 0 && begin[i] % kBlockRows == 0 && begin[i] <= end[i] && end[i] <= rows;
    if (!fine) bad_value(op, "ranges are out of order or out of bounds");
    queries.count = static_cast<int64_t>(offsets.size()) - 1;
    if (range_table) {
      table = lists::integers(*range_table, op, "range_table");
      fine = static_cast<int64_t>(table.size()) == count;
      for (const int64_t t : table) fine = fine && t >= 0 && t < tables.shape[0];
    } else {
      fine = queries.count == tables.shape[0];
    }
    if (!fine) bad_value(op, "ranges name tables that are not there");
    ranges.offset = column<float>(range_offset, op, "range_offset", DType::f32, count);
    if (ranges.offset) expect_finite(ranges.offset, count, op, "range_offset");
    ranges.offsets = offsets.data();
    ranges.begin = begin.data();
    ranges.end = end.data();
    ranges.table = range_table ? table.data() : nullptr;
  }

  const Ranges* lists_or_all() const { return has_ranges ? &ranges : nullptr; }
};

void pq_to_blocks(const TensorView& codes, int nbits, int64_t first, const TensorView& blocks) {
  const char* op = "pq.to_blocks";
  expect(codes, op, "codes", {DType::u8}, 2);
  const Layout layout = layout_of(nbits, codes.shape[1], op);
  if (first < 0 || first > kMostRows) bad_value(op, "first is " + std::to_string(first));
  check_blocks(blocks, layout, first + codes.shape[0], op);
  if (blocks.read_only) bad_value(op, "blocks are read-only");
  const auto rows = matrix<const uint8_t>(codes);
  py::gil_scoped_release release;
  for (int64_t i = 0; nbits != 8 && i < rows.rows; ++i)
    for (int64_t m = 0; m < rows.cols; ++m)
      if (rows.row(i)[m * rows.col_stride] >> nbits)
        bad_value(op, "codes hold " + std::to_string(rows.row(i)[m * rows.col_stride]) +
                          ", which takes more than " + std::to_string(nbits) + " bits");
  to_blocks(rows, layout, first, static_cast<uint8_t*>(blocks.data));
}

void pq_from_blocks(const TensorView& blocks, int nbits, int64_t subspaces, int64_t rows,
                    const TensorView& positions, const TensorView& out) {
  const char* op = "pq.from_blocks";
  const Layout layout = layout_of(nbits, subspaces, op);
  const Blocks from = blocks_of(blocks, layout, rows, op);
  const std::vector<int64_t> at = lists::integers(positions, op, "positions");
  const auto count = static_cast<int64_t>(at.size());
  for (const int64_t p : at)
    if (p < 0 || p >= rows)
      bad_value(op, "positions hold " + std::to_string(p) + ", but there are " +
                        std::to_string(rows) + " rows");
  expect_output(out, op, "out", DType::u8, {count, subspaces});
  py::gil_scoped_release release;
  from_blocks(from, at.data(), count, static_cast<uint8_t*>(out.data));
}

void pq_topk(const TensorView& tables, const Optional& offset, const TensorView& blocks, int nbits,
             int64_t subspaces, int64_t rows, const Optional& scale, const Optional& bias,
             const Optional& mask, const Optional& ids, const Optional& range_offsets,
             const Optional& range_begin, const Optional& range_end, const Optional& range_table,
             const Optional& range_offset, const TensorView& values, const TensorView& found) {
  const char* op = "pq.topk";
  const Arguments in(tables, offset, blocks, nbits, subspaces, rows, scale, bias, mask, ids,
                     range_offsets, range_begin, range_end, range_table, range_offset, op);
  expect(values, op, "values", {DType::f32}, 2);
  const int64_t k = values.shape[1];
  expect_output(values, op, "values", DType::f32, {in.queries.count, k});
  expect_output(found, op, "found", DType::i64, {in.queries.count, k});
  py::gil_scoped_release release;
  topk(in.queries, in.database, in.lists_or_all(), k, static_cast<float*>(values.data),
       static_cast<int64_t*>(found.data));
}

std::unique_ptr<RangeResult> pq_range(const TensorView& tables, const Optional& offset,
                                      const TensorView& blocks, int nbits, int64_t subspaces,
                                      int64_t rows, const Optional& scale, const Optional& bias,
                                      const Optional& mask, const Optional& ids,
                                      const Optional& range_offsets, const Optional& range_begin,
                                      const Optional& range_end, const Optional& range_table,
                                      const Optional& range_offset, double radius) {
  const char* op = "pq.range";
  const Arguments in(tables, offset, blocks, nbits, subspaces, rows, scale, bias, mask, ids,
                     range_offsets, range_begin, range_end, range_table, range_offset, op);
  if (std::isnan(radius)) bad_value(op, "radius is NaN");
  // The largest float32 that is not above it: costs are float32.
  float within = static_cast<float>(radius);
  if (within > radius) within = std::nextafter(within, -INFINITY);
  py::gil_scoped_release release;
  return std::make_unique<RangeResult>(in.queries, in.database, in.lists_or_all(), within);
}

void write_range(const RangeResult& result, const TensorView& indptr, const TensorView& values,
                 const TensorView& ids) {
  const char* op = "pq.range";
  expect_output(indptr, op, "indptr", DType::i64, {result.queries() + 1});
  expect_output(values, op, "values", DType::f32, {result.total()});
  expect_output(ids, op, "ids", DType::i64, {result.total()});
  py::gil_scoped_release release;
  result.write(static_cast<int64_t*>(indptr.data), static_cast<float*>(values.data),
               static_cast<int64_t*>(ids.data));
}

void pq_rescore(const TensorView& x, const TensorView& vectors, const Optional& scale,
                const TensorView& candidates, bool l2, const TensorView& out) {
  const char* op = "pq.rescore";
  expect(x, op, "x", {DType::f32}, 2);
  expect(vectors, op, "vectors", {DType::i8, DType::f16}, 2);
  if (!is_contiguous(vectors)) bad_value(op, "vectors are not contiguous");
  const int64_t rows = vectors.shape[0], dim = vectors.shape[1];
  if (x.shape[1] > dim)
    bad_value(op, "x has " + std::to_string(x.shape[1]) + " columns but vectors have " +
                      std::to_string(dim));
  if (scale.has_value() != (vectors.dtype == DType::i8)) bad_value(op, "scale goes with int8");
  const Stored stored{vectors.data, vectors.dtype,
                      column<float>(scale, op, "scale", DType::f32, rows), dim};
  expect(candidates, op, "candidates", {DType::i64}, 2);
  const int64_t nq = x.shape[0], c = candidates.shape[1];
  lists::expect_shape(candidates, op, "candidates", {nq, c});
  expect_output(out, op, "out", DType::f32, {nq, c});
  std::vector<int64_t> at(nq * c);
  for (int64_t i = 0; i < nq * c; ++i) {
    at[i] = static_cast<const int64_t*>(
        candidates.data)[i / c * candidates.strides[0] + i % c * candidates.strides[1]];
    if (at[i] >= rows)
      bad_value(op, "candidates hold " + std::to_string(at[i]) + ", but there are " +
                        std::to_string(rows) + " rows");
  }
  const auto queries = matrix<const float>(x);
  py::gil_scoped_release release;
  rescore(queries, stored, at.data(), c, l2, static_cast<float*>(out.data));
}

}  // namespace

void bind_pq_scan(py::module_& m) {
  m.attr("pq_block_rows") = kBlockRows;
  m.attr("pq_max_subspaces") = kMaxSubspaces;
  m.def("pq_block_shape", [](int64_t subspaces, int nbits) {
    return py::tuple(py::cast(block_shape(layout_of(nbits, subspaces, "pq.block_shape"))));
  });
  m.def("pq_to_blocks", pq_to_blocks);
  m.def("pq_from_blocks", pq_from_blocks);
  m.def("pq_topk", pq_topk);
  m.def("pq_range", pq_range);
  m.def("pq_rescore", pq_rescore);
  py::class_<RangeResult>(m, "PqRange")
      .def_property_readonly("total", &RangeResult::total)
      .def("write", write_range);
}

}  // namespace pentad
