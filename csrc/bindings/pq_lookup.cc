// SPDX-License-Identifier: Apache-2.0
// The entries of lookups, table sums and codes. Everything that could make a kernel read or write
// out of bounds is refused here or, where codes are concerned, while they are read.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "bindings/lists.h"
#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "common/ceil_div.h"
#include "pq/codes.h"
#include "pq/codes_cuda.h"
#include "pq/lookup.h"
#include "pq/lookup_cuda.h"
#include "pq/table_sum.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace pq;
using Optional = std::optional<TensorView>;

[[noreturn]] void bad_dtype(const char* op, const char* name, const TensorView& view,
                            const std::string& expected) {
  throw TypeMismatch("[" + std::string(op) + "] " + name + " has dtype " + dtype_name(view.dtype) +
                     ", expected " + expected);
}

Codes codes_of(const TensorView& view, const char* op, const char* name, int rank, Device on = {}) {
  expect(view, op, name,
         {DType::u8, DType::i8, DType::u16, DType::i16, DType::u32, DType::i32, DType::u64,
          DType::i64},
         rank, on);
  return {view.data,       view.dtype,
          view.shape[0],   rank == 2 ? view.shape[1] : 1,
          view.strides[0], rank == 2 ? view.strides[1] : 1};
}

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void expect_shape(const TensorView& view, const char* op, const char* name,
                  std::initializer_list<int64_t> shape) {
  lists::expect_shape(view, op, name, shape);
}

// --- Lookup
// ---------------------------------------------------------------------------------------

// Borrowed tables, turned where their columns do not follow each other.
class Tables {
 public:
  Tables(const py::sequence& list, const char* op, Device on) : op_(op), on_(on) {
    for (const py::handle& item : list) {
      holders_.emplace_back().borrow(item);
      add(holders_.back().view);
    }
    if (tables.empty()) bad_value(op, "there is no table");
  }

  std::vector<Table> tables;
  int64_t width = 0, rows = 0;
  DType dtype = DType::f32;
  const std::deque<ViewHolder>& holders() const { return holders_; }

  // Without the GIL: may copy much.
  void turn() {
    for (Turned& t : turned_) {
      const int64_t size = size_of(dtype), rows = tables[t.table].rows;
      const char* from = tables[t.table].base;
      char* to = copies_.emplace_back(rows * width * size).data();
      tables[t.table] = {to, rows, width * size};
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t d = 0; d < width; ++d, to += size)
          std::memcpy(to, from + (k * t.row_stride + d * t.stride) * size, size);
    }
  }

 private:
  struct Turned {
    size_t table;
    int64_t row_stride, stride;
  };

  void add(const TensorView& view) {
    expect(view, op_, "codebooks", {DType::f32, DType::f16, DType::bf16, DType::f64}, -1, on_);
    if (view.rank != 2 && view.rank != 3)
      bad_value(op_, "codebooks have shape " + shape_text(view) + ", expected 2 or 3 dimensions");
    const int64_t columns = view.shape[view.rank - 1], levels = view.shape[view.rank - 2];
    if (holders_.size() == 1) dtype = view.dtype, width = columns;
    if (view.dtype != dtype) bad_dtype(op_, "codebooks", view, dtype_name(dtype));
    if (columns != width)
      bad_value(op_, "codebooks have rows of " + std::to_string(columns) + " and " +
                         std::to_string(width) + " numbers, expected one width");
    if (levels > kMostTableRows)
      bad_value(op_, "codebooks have " + std::to_string(levels) + " rows");
    const int64_t count = view.rank == 3 ? view.shape[0] : 1, size = size_of(dtype);
    const int64_t row_stride = view.strides[view.rank - 2], stride = view.strides[view.rank - 1];
    if (on_.is_cuda() && stride != 1 && width > 1)
      bad_value(op_, "codebooks have columns apart, expected ones next to each other");
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = view.rank == 3 ? m * view.strides[0] : 0;
      if (stride != 1 && width > 1) turned_.push_back({tables.size(), row_stride, stride});
      tables.push_back(
          {static_cast<const char*>(view.data) + at * size, levels, row_stride * size});
      rows += levels;
    }
  }

  const char* op_;
  const Device on_;
  std::deque<ViewHolder> holders_;
  std::vector<Turned> turned_;
  std::deque<std::vector<char>> copies_;
};

struct LookupArguments {
  Lookup p;
  const Device on;
  Tables tables;
  std::vector<int64_t> bags;
  Codes device_bags;
  bool cuda;  // the CUDA kernels run

  LookupArguments(const char* op, const TensorView& codes, const py::sequence& list,
                  const Optional& weights, const Optional& offsets, const std::string& combine,
                  const Optional& scratch)
      : on(device_of(codes)), tables(list, op, on) {
    p.op = op;
    p.codes = codes_of(codes, op, "codes", 2, on);
    const int64_t count = static_cast<int64_t>(tables.tables.size());
    if (p.codes.columns != count)
      bad_value(op, "codes have " + std::to_string(p.codes.columns) + " columns but there are " +
                        std::to_string(count) + " codebooks");
    p.width = tables.width, p.dtype = tables.dtype;
    cuda = runs_cuda(on, p.dtype != DType::f64, op, "float64") && (on.is_cuda() || scratch);
    if (combine == "concat") p.combine = Combine::concat;
    else if (combine == "sum") p.combine = Combine::sum;
    else if (combine == "mean") p.combine = Combine::mean;
    else if (combine == "product") p.combine = Combine::product;
    else bad_value(op, "combine is '" + combine + "', expected concat, sum, mean or product");
    if (weights) take_weights(*weights);
    if (offsets) take_offsets(*offsets);
  }

  const Codes* offsets() const { return p.bags || device_bags.data ? &device_bags : nullptr; }
  int64_t outputs() const { return offsets() ? device_bags.rows : p.codes.rows; }

  // Without the GIL. Contents are looked at where that needs no wait.
  void prepare() {
    tables.turn();
    p.tables = tables.tables;
    if (!cuda || on.is_cuda()) return;
    std::vector<int64_t> sizes;
    for (const Table& table : p.tables) sizes.push_back(table.rows);
    refuse_codes(p.op, p.codes, sizes.data());
  }

 private:
  void take_weights(const TensorView& weights) {
    if (p.dtype == DType::f64) expect(weights, p.op, "weights", {DType::f64}, 2, on);
    else expect(weights, p.op, "weights", {DType::f32, DType::f16, DType::bf16}, 2, on);
    expect_shape(weights, p.op, "weights", {p.codes.rows, p.codes.columns});
    static const float nothing = 0;  // an empty array has no address
    p.weights = weights.data ? weights.data : &nothing;
    p.weights_dtype = weights.dtype;
    p.weight_row_stride = weights.strides[0], p.weight_stride = weights.strides[1];
  }

  void take_offsets(const TensorView& offsets) {
    expect(offsets, p.op, "offsets", {DType::i32, DType::i64}, 1, on);
    static const int64_t nothing = 0;
    device_bags = codes_of(offsets, p.op, "offsets", 1, on);
    if (!device_bags.data) device_bags.data = &nothing;
    if (on.is_cuda()) return;
    bags = lists::integers(offsets, p.op, "offsets");
    const int64_t rows = p.codes.rows;
    if (bags.empty() ? rows != 0 : bags[0] != 0)
      bad_value(p.op, "offsets " +
                          (bags.empty() ? std::string("are empty")
                                        : "begin with " + std::to_string(bags[0])) +
                          ", expected 0 first");
    for (size_t b = 0; b < bags.size(); ++b) {
      const int64_t next = b + 1 < bags.size() ? bags[b + 1] : rows;
      if (bags[b] > next)
        bad_value(p.op, "offsets descend from " + std::to_string(bags[b]) + " to " +
                            std::to_string(next) + ", expected rising ones up to " +
                            std::to_string(rows) + " rows");
    }
    p.bag_count = static_cast<int64_t>(bags.size());
    bags.push_back(rows);
    p.bags = bags.data();
  }
};

void bind_lookups(py::module_& m) {
  m.def(
      "pq_lookup",
      [](const TensorView& codes, const py::sequence& codebooks, const Optional& weights,
         const Optional& offsets, const std::string& combine, const TensorView& out,
         const Optional& scratch, uintptr_t stream) {
        const char* op = "pq.lookup";
        LookupArguments a(op, codes, codebooks, weights, offsets, combine, scratch);
        expect_output(out, op, "out", a.p.dtype, {a.outputs(), a.p.out_width()}, a.on);
        Writes writes(op);
        writes.input("codes", codes);
        writes.input("weights", weights);
        for (const ViewHolder& table : a.tables.holders()) writes.input("codebooks", table.view);
        writes.output("out", out);
        writes.finish();
        py::gil_scoped_release release;
        a.prepare();
        if (!a.cuda) return lookup(a.p, out.data);
        cuda::lookup(stream_of(a.on, stream), a.p, a.offsets(), out.data,
                     scratch_of(scratch, op, cuda::lookup_scratch(a.p.subspaces()), a.on));
      },
      py::arg("codes"), py::arg("codebooks"), py::arg("weights"), py::arg("offsets"),
      py::arg("combine"), py::arg("out"), py::arg("scratch") = py::none(), py::arg("stream") = 0);
  m.def(
      "pq_lookup_backward",
      [](const TensorView& d_out, const TensorView& codes, const py::sequence& codebooks,
         const Optional& weights, const Optional& offsets, const std::string& combine,
         const Optional& d_tables, const Optional& d_weights, const Optional& scratch,
         uintptr_t stream) {
        const char* op = "pq.lookup";
        LookupArguments a(op, codes, codebooks, weights, offsets, combine, scratch);
        if (a.p.dtype == DType::f64) expect(d_out, op, "d_out", {DType::f64}, 2, a.on);
        else expect(d_out, op, "d_out", {DType::f32, DType::f16, DType::bf16}, 2, a.on);
        expect_shape(d_out, op, "d_out", {a.outputs(), a.p.out_width()});
        if (d_out.shape[1] > 1 && d_out.strides[1] != 1)
          bad_value(op, "d_out has columns apart, expected ones next to each other");
        Writes writes(op);
        writes.input("d_out", d_out);
        writes.input("codes", codes);
        writes.input("weights", weights);
        for (const ViewHolder& table : a.tables.holders()) writes.input("codebooks", table.view);
        LookupGradients g = {d_out.data, d_out.dtype, d_out.strides[0], nullptr, nullptr};
        if (d_tables) {
          expect_output(*d_tables, op, "d_tables", wide(a.p.dtype), {a.tables.rows, a.p.width},
                        a.on);
          writes.output("d_tables", *d_tables);
          g.d_tables = d_tables->data;
        }
        if (d_weights) {
          expect_output(*d_weights, op, "d_weights", wide(a.p.dtype),
                        {a.p.codes.rows, a.p.codes.columns}, a.on);
          writes.output("d_weights", *d_weights);
          g.d_weights = d_weights->data;
        }
        writes.finish();
        py::gil_scoped_release release;
        a.prepare();
        if (!a.cuda) return lookup_backward(a.p, g);
        const int64_t bytes = cuda::lookup_backward_scratch(
            a.p.codes.rows, a.p.subspaces(), a.tables.rows, a.p.width, g.d_tables != nullptr);
        cuda::lookup_backward(stream_of(a.on, stream), a.p, a.offsets(), g,
                              scratch_of(scratch, op, bytes, a.on));
      },
      py::arg("d_out"), py::arg("codes"), py::arg("codebooks"), py::arg("weights"),
      py::arg("offsets"), py::arg("combine"), py::arg("d_tables"), py::arg("d_weights"),
      py::arg("scratch") = py::none(), py::arg("stream") = 0);
  m.def("pq_lookup_scratch", &cuda::lookup_scratch);
  m.def("pq_lookup_backward_scratch", &cuda::lookup_backward_scratch);
}

// --- Sums of table entries
// ------------------------------------------------------------------------

void refuse_levels(const char* op, const Codes& codes, int64_t levels) {
  refuse_codes(op, codes, std::vector<int64_t>(codes.columns, levels).data());
}

void bind_table_sums(py::module_& m) {
  m.def(
      "pq_score_tables",
      [](const TensorView& queries, const TensorView& codebooks, const std::string& metric,
         const TensorView& tables, uintptr_t stream) {
        const char* op = "pq.adc";
        const Device on = device_of(queries);
        expect(queries, op, "queries", {DType::f32, DType::f64}, 2, on);
        expect(codebooks, op, "codebooks", {queries.dtype}, 3, on);
        if (metric != "l2" && metric != "ip")
          bad_value(op, "metric is '" + metric + "', expected l2 or ip");
        ScoreTables p = {};
        p.dtype = queries.dtype;
        p.queries = queries.shape[0];
        p.subspaces = codebooks.shape[0], p.levels = codebooks.shape[1],
        p.width = codebooks.shape[2];
        expect_shape(queries, op, "queries", {p.queries, p.subspaces * p.width});
        p.q = queries.data, p.q_row_stride = queries.strides[0], p.q_stride = queries.strides[1];
        p.codebooks = codebooks.data;
        for (int i = 0; i < 3; ++i) p.c_stride[i] = codebooks.strides[i];
        p.inner_product = metric == "ip";
        expect_output(tables, op, "tables", p.dtype, {p.queries, p.subspaces, p.levels}, on);
        Writes writes(op);
        writes.input("queries", queries);
        writes.input("codebooks", codebooks);
        writes.output("tables", tables);
        writes.finish();
        py::gil_scoped_release release;
        if (!runs_cuda(on, p.dtype != DType::f64, op, "float64"))
          return score_tables(p, tables.data);
        cuda::score_tables(stream_of(on, stream), p, static_cast<float*>(tables.data));
      },
      py::arg("queries"), py::arg("codebooks"), py::arg("metric"), py::arg("tables"),
      py::arg("stream") = 0);
  m.def(
      "pq_table_sum",
      [](const TensorView& tables, const TensorView& view, const TensorView& out,
         uintptr_t stream) {
        const char* op = "pq.adc";
        const Device on = device_of(tables);
        expect(tables, op, "tables", {DType::f32, DType::f64}, 3, on);
        if (!is_contiguous(tables)) bad_value(op, "tables are not contiguous");
        const Codes codes = codes_of(view, op, "codes", 2, on);
        const int64_t queries = tables.shape[0], levels = tables.shape[2];
        expect_shape(tables, op, "tables", {queries, codes.columns, levels});
        if (levels > kMostTableRows) bad_value(op, "tables have too many levels");
        expect_output(out, op, "out", tables.dtype, {queries, codes.rows}, on);
        Writes writes(op);
        writes.input("tables", tables);
        writes.input("codes", view);
        writes.output("out", out);
        writes.finish();
        py::gil_scoped_release release;
        if (!runs_cuda(on, tables.dtype != DType::f64, op, "float64"))
          return table_sum(op, tables.data, tables.dtype, queries, levels, codes, out.data);
        if (!on.is_cuda()) refuse_levels(op, codes, levels);
        cuda::table_sum(stream_of(on, stream), static_cast<const float*>(tables.data), queries,
                        levels, codes, static_cast<float*>(out.data));
      },
      py::arg("tables"), py::arg("codes"), py::arg("out"), py::arg("stream") = 0);
  m.def(
      "pq_table_sum_backward",
      [](const TensorView& d_out, const TensorView& view, const TensorView& d_tables,
         const Optional& scratch, uintptr_t stream) {
        const char* op = "pq.adc";
        const Device on = device_of(d_out);
        expect(d_out, op, "d_out", {DType::f32, DType::f64}, 2, on);
        const Codes codes = codes_of(view, op, "codes", 2, on);
        expect(d_tables, op, "d_tables", {d_out.dtype}, 3, on);
        const int64_t queries = d_out.shape[0], levels = d_tables.shape[2];
        expect_shape(d_out, op, "d_out", {queries, codes.rows});
        if (levels > kMostTableRows) bad_value(op, "tables have too many levels");
        expect_output(d_tables, op, "d_tables", d_out.dtype, {queries, codes.columns, levels}, on);
        Writes writes(op);
        writes.input("d_out", d_out);
        writes.input("codes", view);
        writes.output("d_tables", d_tables);
        writes.finish();
        py::gil_scoped_release release;
        if (!runs_cuda(on, d_out.dtype != DType::f64, op, "float64") || !(on.is_cuda() || scratch))
          return table_sum_backward(op, d_out.data, d_out.dtype, d_out.strides[0], d_out.strides[1],
                                    queries, levels, codes, d_tables.data);
        if (!on.is_cuda()) refuse_levels(op, codes, levels);
        const int64_t bytes =
            cuda::table_sum_backward_scratch(codes.rows, codes.columns, queries, levels);
        cuda::table_sum_backward(stream_of(on, stream), static_cast<const float*>(d_out.data),
                                 d_out.strides[0], d_out.strides[1], queries, levels, codes,
                                 static_cast<float*>(d_tables.data),
                                 scratch_of(scratch, op, bytes, on));
      },
      py::arg("d_out"), py::arg("codes"), py::arg("d_tables"), py::arg("scratch") = py::none(),
      py::arg("stream") = 0);
  m.def("pq_table_sum_backward_scratch", &cuda::table_sum_backward_scratch);
}

// --- Codes
// ----------------------------------------------------------------------------------------

int bits_of(int64_t nbits, const char* op) {
  if (nbits < 1 || nbits > kMostBits)
    bad_value(op,
              "nbits is " + std::to_string(nbits) + ", expected 1 to " + std::to_string(kMostBits));
  return static_cast<int>(nbits);
}

void check_sizes(const std::vector<int64_t>& sizes, int64_t most, const char* op) {
  for (int64_t size : sizes)
    if (size < 1 || size > most)
      bad_value(op,
                "sizes hold " + std::to_string(size) + ", expected 1 to " + std::to_string(most));
}

void py_pack_codes(const TensorView& view, int64_t nbits, const TensorView& packed,
                   uintptr_t stream) {
  const char* op = "pq.pack_codes";
  const Device on = device_of(view);
  const Codes codes = codes_of(view, op, "codes", 2, on);
  const int bits = bits_of(nbits, op);
  expect_output(packed, op, "packed", DType::u8, {codes.rows, ceil_div(codes.columns * bits, 8)},
                on);
  Writes writes(op);
  writes.input("codes", view);
  writes.output("packed", packed);
  writes.finish();
  auto* bytes = static_cast<uint8_t*>(packed.data);
  py::gil_scoped_release release;
  if (!runs_cuda(on)) return pack_codes(op, codes, bits, bytes);
  if (!on.is_cuda()) refuse_levels(op, codes, int64_t{1} << bits);
  cuda::pack_codes(stream_of(on, stream), codes, bits, bytes);
}

void py_unpack_codes(const TensorView& packed, int64_t nbits, const TensorView& out,
                     uintptr_t stream) {
  const char* op = "pq.unpack_codes";
  const Device on = device_of(packed);
  expect(packed, op, "packed", {DType::u8}, 2, on);
  const int bits = bits_of(nbits, op);
  expect(out, op, "out", {bits <= 8 ? DType::u8 : DType::i32}, 2, on);
  expect_output(out, op, "out", out.dtype, {packed.shape[0], out.shape[1]}, on);
  expect_shape(packed, op, "packed", {packed.shape[0], ceil_div(out.shape[1] * bits, 8)});
  Writes writes(op);
  writes.input("packed", packed);
  writes.output("out", out);
  writes.finish();
  const auto* bytes = static_cast<const uint8_t*>(packed.data);
  const int64_t rows = packed.shape[0], columns = out.shape[1];
  const int64_t row_stride = packed.strides[0], step = packed.strides[1];
  py::gil_scoped_release release;
  if (runs_cuda(on))
    cuda::unpack_codes(stream_of(on, stream), bytes, row_stride, step, rows, columns, bits,
                       out.data);
  else unpack_codes(bytes, row_stride, step, rows, columns, bits, out.data);
}

// ids (n), out (n, count).
Codes ids_of(const TensorView& view, const TensorView& out, const std::vector<int64_t>& sizes,
             const char* op, Device on) {
  const Codes ids = codes_of(view, op, "ids", 1, on);
  check_sizes(sizes, kMostTableRows, op);
  expect_output(out, op, "out", DType::i64, {ids.rows, static_cast<int64_t>(sizes.size())}, on);
  Writes writes(op);
  writes.input("ids", view);
  writes.output("out", out);
  writes.finish();
  return ids;
}

void py_hash_codes(const TensorView& view, const std::vector<uint64_t>& seeds,
                   const std::vector<int64_t>& sizes, const TensorView& out, uintptr_t stream) {
  const char* op = "pq.hash_codes";
  const Device on = device_of(view);
  const int64_t count = static_cast<int64_t>(sizes.size());
  if (seeds.size() != sizes.size())
    bad_value(op, std::to_string(seeds.size()) + " seeds but " + std::to_string(count) + " sizes");
  const Codes ids = ids_of(view, out, sizes, op, on);
  auto* hashes = static_cast<int64_t*>(out.data);
  py::gil_scoped_release release;
  if (runs_cuda(on))
    cuda::hash_codes(stream_of(on, stream), ids, seeds.data(), sizes.data(), count, hashes);
  else hash_codes(ids, seeds.data(), sizes.data(), count, hashes);
}

void py_digits(const TensorView& view, const std::vector<int64_t>& sizes, const TensorView& out,
               uintptr_t stream) {
  const char* op = "pq.quotient_remainder";
  const Device on = device_of(view);
  const Codes ids = ids_of(view, out, sizes, op, on);
  const int64_t count = static_cast<int64_t>(sizes.size());
  auto* numbers = static_cast<int64_t*>(out.data);
  py::gil_scoped_release release;
  if (!on.is_cuda()) digits(op, ids, sizes.data(), count, numbers);  // looks at the ids
  if (!runs_cuda(on)) return;
  std::fill_n(numbers, on.is_cuda() ? 0 : ids.rows * count, -1);
  cuda::digits(stream_of(on, stream), ids, sizes.data(), count, numbers);
}

void bind_codes(py::module_& m) {
  const auto default_stream = py::arg("stream") = 0;
  m.def("pq_pack_codes", &py_pack_codes, py::arg("codes"), py::arg("nbits"), py::arg("packed"),
        default_stream);
  m.def("pq_unpack_codes", &py_unpack_codes, py::arg("packed"), py::arg("nbits"), py::arg("out"),
        default_stream);
  m.def("pq_hash_codes", &py_hash_codes, py::arg("ids"), py::arg("seeds"), py::arg("sizes"),
        py::arg("out"), default_stream);
  m.def("pq_digits", &py_digits, py::arg("ids"), py::arg("sizes"), py::arg("out"), default_stream);
}

}  // namespace

void bind_pq_lookup(py::module_& m) {
  bind_lookups(m);
  bind_table_sums(m);
  bind_codes(m);
}

}  // namespace pentad
