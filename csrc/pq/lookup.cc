// SPDX-License-Identifier: Apache-2.0
// Cuts lookups into pieces of rows, and their gradients into pieces of the tables.
//
// A row of a table is always summed by one thread, over rising rows of the codes, so however the
// tables are cut the bits are the same: first by subspaces, then by columns, then by rows of a
// table.
// (Sorting the codes first would read the gradients at random; summing some rows each and adding
// the pieces would need a copy of the tables per piece.)
#include "pq/lookup.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "common/ceil_div.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/reals.h"
#include "common/scratch.h"

namespace pentad::pq {

const LookupKernels& lookup_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::pq_lookup_kernels;
    case Isa::v4: return v4::pq_lookup_kernels;
    case Isa::v3: return v3::pq_lookup_kernels;
    default: return v2::pq_lookup_kernels;
#else
    default: return neon::pq_lookup_kernels;
#endif
  }
}

namespace {

constexpr int64_t kPieceCodes = 8192;        // of a piece of rows: 32 KB of indices
constexpr int64_t kSerialBytes = 1 << 17;    // moved, below which waking threads does not pay
constexpr int64_t kCachedBytes = 1 << 18;    // of tables, above which rows are fetched ahead
constexpr int64_t kStreamedBytes = 1 << 23;  // of copies, above which they go past the caches
constexpr int64_t kStagedBytes = 1 << 13;
constexpr int64_t kProductFloats = 1 << 21;  // of the gradients of terms at a time
constexpr int64_t kLeastColumns = 16;        // of a piece of a table's columns: a cache line

const LookupKernels& kernels() { return lookup_kernels(); }

void for_tasks(int64_t bytes, int64_t tasks, const std::function<void(int64_t)>& task) {
  parallel_for_if(bytes > kSerialBytes, tasks, task);
}

// What a driver keeps beside the problem.
struct Driver {
  const Lookup& p;
  const int64_t columns;
  std::vector<int64_t> sizes;
  bool same_size = true;
  std::atomic<bool> bad{false};

  explicit Driver(const Lookup& problem) : p(problem), columns(problem.subspaces()) {
    for (const Table& table : p.tables) {
      sizes.push_back(table.rows);
      same_size &= table.rows == sizes[0];
    }
  }

  int64_t piece_rows() const { return std::max<int64_t>(1, kPieceCodes / columns); }

  // Codes of `rows` rows and `count` columns from the given ones on; notes one without a row.
  bool read(int64_t row, int64_t rows, int64_t column, int64_t count, int32_t* index) {
    const Codes& codes = p.codes;
    const int64_t at = row * codes.row_stride + column * codes.column_stride;
    const char* data = static_cast<const char*>(codes.data) + at * size_of(codes.dtype);
    const bool good =
        kernels().read_codes({data, codes.dtype, rows, count, codes.row_stride, codes.column_stride,
                              sizes.data() + column, same_size, index});
    if (!good) bad = true;
    return good;
  }

  void finish() const {
    if (!bad) return;
    refuse_codes(p.op, p.codes, sizes.data());
    throw std::invalid_argument("[" + std::string(p.op) + "] codes changed during the call");
  }

  // weights of some rows and columns as floats.
  void weights(int64_t row, int64_t rows, int64_t column, int64_t count, float* out) const {
    const auto widen = [&](int64_t i, int64_t stride, int64_t n) {
      const int64_t at = (row + i) * p.weight_row_stride + column * p.weight_stride;
      kernels().widen(static_cast<const char*>(p.weights) + at * size_of(p.weights_dtype),
                      p.weights_dtype, stride, n, out + i * count);
    };
    if (count == 1) return widen(0, p.weight_row_stride, rows);
    if (p.weight_stride == 1 && p.weight_row_stride == count) return widen(0, 1, rows * count);
    for (int64_t i = 0; i < rows; ++i) widen(i, p.weight_stride, count);
  }
};

// --- Forward
// --------------------------------------------------------------------------------------

// Outputs [first, last) of a piece and the rows of codes that they take.
struct Piece {
  int64_t first, last, row, rows;
};

std::vector<Piece> pieces_of(const Lookup& p, int64_t most_rows) {
  std::vector<Piece> pieces;
  const int64_t outputs = p.outputs();
  for (int64_t first = 0; first < outputs;) {
    int64_t last = std::min(outputs, first + most_rows);
    if (p.bags) {
      const auto fits = [&](int64_t b) { return p.bags[b] - p.bags[first] <= most_rows; };
      while (last > first + 1 && !fits(last)) last = (first + last) / 2;
    }
    const int64_t row = p.bags ? p.bags[first] : first, end = p.bags ? p.bags[last] : last;
    pieces.push_back({first, last, row, end - row});
    first = last;
  }
  return pieces;
}

}  // namespace

void lookup(const Lookup& p, void* out) {
  if (p.dtype == DType::f64) return reference_lookup(p, out);
  Driver driver(p);
  const int64_t columns = driver.columns, size = size_of(p.dtype);
  const bool copies = p.combine == Combine::concat && !p.weights && !p.bags;
  const int64_t out_bytes = p.out_width() * size;
  int64_t most_rows = driver.piece_rows();
  while (most_rows > 16 && ceil_div(p.codes.rows, most_rows) < 3 * num_threads()) most_rows /= 2;
  const std::vector<Piece> pieces = pieces_of(p, most_rows);
  const bool streams = p.outputs() * out_bytes >= kStreamedBytes;
  int64_t table_bytes = 0;
  for (const Table& table : p.tables) table_bytes += table.rows * p.width * size;
  const int64_t bytes = p.codes.rows * columns * p.width * size + p.outputs() * out_bytes;
  for_tasks(bytes, static_cast<int64_t>(pieces.size()), [&](int64_t task) {
    const Piece& piece = pieces[task];
    const int64_t codes = piece.rows * columns;
    Scratch<int32_t> index(codes);
    if (!driver.read(piece.row, piece.rows, 0, columns, index.get())) return;
    char* to = static_cast<char*>(out) + piece.first * out_bytes;
    if (copies) {
      const int64_t staged = streams ? std::max(kStagedBytes, out_bytes) : 0;
      Scratch<char> stage(staged);
      return kernels().gather({p.tables.data(), columns, piece.rows, p.width * size, index.get(),
                               to, streams ? stage.get() : nullptr, staged});
    }
    Scratch<float> floats(p.width + (p.weights ? codes : 0));
    float* weights = p.weights ? floats.get() + p.width : nullptr;
    if (weights) driver.weights(piece.row, piece.rows, 0, columns, weights);
    CombineJob job = {};
    job.tables = p.tables.data(), job.dtype = p.dtype;
    job.columns = columns, job.width = p.width;
    job.index = index.get() - (p.bags ? piece.row * columns : 0);
    job.weights = weights ? weights - (p.bags ? piece.row * columns : 0) : nullptr;
    job.bags = p.bags ? p.bags + piece.first : nullptr;
    job.fetched = table_bytes < kCachedBytes ? 0 : p.bags ? piece.row + piece.rows : piece.rows;
    job.outputs = piece.last - piece.first;
    job.combine = p.combine;
    job.out = to, job.scratch = floats.get();
    kernels().combine(job);
  });
  driver.finish();
}

// --- Backward
// -------------------------------------------------------------------------------------

namespace {

// Gradients of terms: where the row of a code is found.
struct Gradients {
  const void* data;
  DType dtype;
  int64_t row_stride, column_stride;  // elements
  const int64_t* rows;                // of each row of codes; null: its own number
};

// Rows [begin, end) of the codes; `begin` is row 0 of grad where grad.rows is null.
struct Backward {
  Driver& driver;
  const Lookup& p;
  const Gradients grad;
  const int64_t begin, end;
  const float* scales;  // per row of the problem; null: `scale`
  float scale;

  // Rows as floats with the columns [from, from + count) next to each other, in scratch if they are
  // not so already.
  struct Rows {
    const float* data;
    int64_t step;
    const int64_t* numbers;
  };
  Rows rows(int64_t row, int64_t rows, int64_t from, int64_t count, float* scratch) const {
    const int64_t first = grad.rows ? 0 : row - begin;
    const char* data = static_cast<const char*>(grad.data) +
                       (first * grad.row_stride + from) * size_of(grad.dtype);
    const int64_t* numbers = grad.rows ? grad.rows + row : nullptr;
    if (grad.dtype == DType::f32)
      return {reinterpret_cast<const float*>(data), grad.row_stride, numbers};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t number = numbers ? numbers[i] : i;
      kernels().widen(data + number * grad.row_stride * size_of(grad.dtype), grad.dtype, 1, count,
                      scratch + i * count);
    }
    return {scratch, count, nullptr};
  }
  int64_t row_floats() const {
    return grad.column_stride ? (driver.columns - 1) * grad.column_stride + p.width : p.width;
  }

  void weight_gradients(float* out) const {
    const int64_t columns = driver.columns, width = row_floats();
    const int64_t most =
        std::max<int64_t>(1, std::min(driver.piece_rows(), (1 << 18) / (width + 1)));
    const int64_t bytes = (end - begin) * columns * p.width * 8;
    for_tasks(bytes, ceil_div(end - begin, most), [&](int64_t task) {
      const int64_t row = begin + task * most, count = std::min(most, end - row);
      Scratch<int32_t> index(count * columns);
      if (!driver.read(row, count, 0, columns, index.get())) return;
      Scratch<float> floats(p.width + count + (grad.dtype == DType::f32 ? 0 : count * width));
      float *scaling = floats.get() + p.width, *wide = scaling + count;
      const bool scaled = scales || scale != 1.0f;
      for (int64_t i = 0; scaled && i < count; ++i) scaling[i] = scales ? scales[row + i] : scale;
      const Rows g = rows(row, count, 0, width, wide);
      kernels().weight_gradient({p.tables.data(), p.dtype, g.data, g.step, grad.column_stride,
                                 g.numbers, count, columns, p.width, index.get(),
                                 scaled ? scaling : nullptr, out + row * columns, floats.get()});
    });
  }

  // The sums of subspaces [m, m + count), table columns [from, from + width), part of `parts` of
  // the rows of each table.
  void scatter(int64_t m, int64_t count, int64_t from, int64_t width, int64_t part, int64_t parts,
               float* const* tables) const {
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(2048, kPieceCodes / count));
    std::vector<float*> sums(tables + m, tables + m + count);
    for (float*& sum : sums) sum += from;
    std::vector<int32_t> low(count), high(count);
    for (int64_t c = 0; c < count; ++c) {
      low[c] = static_cast<int32_t>(driver.sizes[m + c] * part / parts);
      high[c] = static_cast<int32_t>(driver.sizes[m + c] * (part + 1) / parts);
    }
    int64_t sum_bytes = 0;
    for (int64_t c = 0; c < count; ++c) sum_bytes += driver.sizes[m + c] * width * 4;
    const int64_t reach = grad.column_stride * (count - 1) + width;
    const bool factored = p.weights || scales || scale != 1.0f;
    const bool widened = grad.dtype != DType::f32;
    const int64_t block = widened ? std::max<int64_t>(1, std::min(most, (1 << 16) / reach)) : most;
    Scratch<int32_t> index(block * count);
    Scratch<float> factors(factored ? block * count : 0), wide(widened ? block * reach : 0);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t n = std::min(block, end - row);
      if (!driver.read(row, n, m, count, index.get())) return;
      float* factor = factored ? factors.get() : nullptr;
      if (p.weights) driver.weights(row, n, m, count, factor);
      else if (factored) std::fill_n(factor, n * count, 1.0f);
      for (int64_t i = 0; scales && i < n; ++i)
        for (int64_t c = 0; c < count; ++c) factor[i * count + c] *= scales[row + i];
      for (int64_t i = 0; !scales && scale != 1.0f && i < n * count; ++i) factor[i] *= scale;
      const Rows g = rows(row, n, m * grad.column_stride + from, reach, wide.get());
      kernels().scatter({g.data, g.step, grad.column_stride, g.numbers, n, count, index.get(),
                         factor, sums.data(), p.width, width, parts > 1 ? low.data() : nullptr,
                         high.data(), sum_bytes >= kCachedBytes});
    }
  }

  void table_gradients(float* const* tables) const {
    const int64_t columns = driver.columns, threads = num_threads();
    const int64_t bytes = (end - begin) * columns * p.width * 8;
    const int64_t wanted = bytes > kSerialBytes ? threads : 1;
    const int64_t groups = std::min(columns, wanted);
    int64_t cuts =
        std::min(ceil_div(wanted, groups), std::max<int64_t>(1, p.width / kLeastColumns));
    const int64_t step = ceil_div(ceil_div(p.width, cuts), kLeastColumns) * kLeastColumns;
    cuts = ceil_div(p.width, step);
    const int64_t parts = ceil_div(wanted, groups * cuts);
    for_tasks(bytes, groups * cuts * parts, [&](int64_t task) {
      const int64_t group = task % groups, cut = task / groups % cuts, part = task / groups / cuts;
      const int64_t m = columns * group / groups, last = columns * (group + 1) / groups;
      scatter(m, last - m, cut * step, std::min(step, p.width - cut * step), part, parts, tables);
    });
  }
};

}  // namespace

void lookup_backward(const Lookup& p, const LookupGradients& g) {
  if (p.dtype == DType::f64) return reference_lookup_backward(p, g);
  Driver driver(p);
  const int64_t columns = driver.columns, n = p.codes.rows, width = p.width;
  float *d_tables = static_cast<float*>(g.d_tables), *d_weights = static_cast<float*>(g.d_weights);
  std::vector<float*> tables;
  int64_t total = 0;
  for (const Table& table : p.tables) {
    tables.push_back(d_tables ? d_tables + total * width : nullptr);
    total += table.rows;
  }
  if (d_tables) {
    constexpr int64_t kZeros = 1 << 18;
    parallel_for(ceil_div(total * width, kZeros), [&](int64_t i) {
      std::fill_n(d_tables + i * kZeros, std::min(kZeros, total * width - i * kZeros), 0.0f);
    });
  }
  if (!n) return;
  if (!width) {
    if (d_weights) std::fill_n(d_weights, n * columns, 0.0f);
    return;
  }

  // The bag of every row, and its part of a mean.
  const bool mean = p.combine == Combine::mean;
  Scratch<int64_t> bag_of(p.bags ? n : 0);
  Scratch<float> scales(p.bags && mean ? n : 0);
  for (int64_t b = 0; p.bags && b < p.bag_count; ++b) {
    const int64_t rows = p.bags[b + 1] - p.bags[b];
    std::fill_n(bag_of.get() + p.bags[b], rows, b);
    if (mean)
      std::fill_n(scales.get() + p.bags[b], rows, 1.0f / static_cast<float>(rows * columns));
  }
  const int64_t* numbers = p.bags ? bag_of.get() : nullptr;

  if (p.combine != Combine::product) {
    const int64_t column_stride = p.combine == Combine::concat ? width : 0;
    const Gradients grad = {g.d_out, g.dtype, g.row_stride, column_stride, numbers};
    const Backward pass = {driver,
                           p,
                           grad,
                           0,
                           n,
                           mean && p.bags ? scales.get() : nullptr,
                           mean && !p.bags ? 1.0f / static_cast<float>(columns) : 1.0f};
    if (d_weights) pass.weight_gradients(d_weights);
    if (d_tables && !driver.bad) pass.table_gradients(tables.data());
    return driver.finish();
  }

  // The gradients of some rows' terms, then as for concat.
  const int64_t most = std::max<int64_t>(1, kProductFloats / (columns * width));
  Scratch<float> terms(std::min(most, n) * columns * width);
  for (int64_t begin = 0; begin < n && !driver.bad; begin += most) {
    const int64_t end = std::min(n, begin + most);
    const Gradients given = {g.d_out, g.dtype, g.row_stride, 0, numbers};
    const int64_t piece = std::max<int64_t>(1, std::min<int64_t>(256, kPieceCodes / columns));
    for_tasks((end - begin) * columns * width * 8, ceil_div(end - begin, piece), [&](int64_t task) {
      const int64_t row = begin + task * piece, count = std::min(piece, end - row);
      Scratch<int32_t> index(count * columns);
      if (!driver.read(row, count, 0, columns, index.get())) return;
      Scratch<float> floats((columns + 1) * width + count * columns +
                            (g.dtype == DType::f32 ? 0 : count * width));
      float *weights = floats.get() + (columns + 1) * width, *wide = weights + count * columns;
      if (p.weights) driver.weights(row, count, 0, columns, weights);
      // d_out's rows are counted from the problem's first.
      const Backward all = {driver, p, given, 0, n, nullptr, 1.0f};
      const Backward::Rows rows = all.rows(row, count, 0, width, wide);
      kernels().product_gradient({p.tables.data(), p.dtype, rows.data, rows.step, rows.numbers,
                                  count, columns, width, index.get(), p.weights ? weights : nullptr,
                                  terms.get() + (row - begin) * columns * width, floats.get()});
    });
    const Gradients grad = {terms.get(), DType::f32, columns * width, width, nullptr};
    const Backward pass = {driver, p, grad, begin, end, nullptr, 1.0f};
    if (d_weights && !driver.bad) pass.weight_gradients(d_weights);
    if (d_tables && !driver.bad) pass.table_gradients(tables.data());
  }
  driver.finish();
}

}  // namespace pentad::pq
