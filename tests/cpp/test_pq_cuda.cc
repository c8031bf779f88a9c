// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of lookups, table sums and their gradients, executed on the CPU lane by lane,
// against the definitions: odd sizes, strides, bags, codes without a row, each order of the lanes.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "common/ceil_div.h"
#include "common/reals.h"
#include "orders.h"
#include "pq/assign_cuda.h"
#include "pq/codes_cuda.h"
#include "pq/lookup_cuda.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937 generator(1);
const CudaStream stream;

int64_t below(int64_t n) { return generator() % n; }

// Memory of exactly this size, so that the sanitizer sees what goes past it.
template <class T>
std::vector<T> room(int64_t count) {
  std::vector<T> memory(count);
  memory.reserve(1);
  return memory;
}

std::vector<char> reals(int64_t n, DType dtype) {
  std::normal_distribution<double> normal;
  std::vector<char> data(n * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) write_real(data.data(), dtype, i, normal(generator));
  return data;
}

// --- Lookups --------------------------------------------------------------------------------------

struct Case {
  Lookup p;
  std::vector<int32_t> codes;
  std::vector<int64_t> bags;
  std::vector<std::vector<char>> tables;
  std::vector<char> weights, d_out;
  int64_t rows = 0;  // of the tables
  Codes offsets;

  Case(int64_t n, const std::vector<int64_t>& sizes, int64_t width, DType dtype, Combine combine,
       bool weighted, bool bagged) {
    const int64_t columns = static_cast<int64_t>(sizes.size()), size = size_of(dtype);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t levels : sizes) codes.push_back(static_cast<int32_t>(below(levels)));
    p.codes = {codes.data(), DType::i32, n, columns, columns, 1};
    for (int64_t levels : sizes) {
      tables.push_back(reals(levels * width, dtype));
      p.tables.push_back({tables.back().data(), levels, width * size});
      rows += levels;
    }
    p.width = width, p.dtype = dtype, p.combine = combine;
    if (weighted) {
      weights = reals(n * columns, DType::bf16);
      p.weights = weights.data(), p.weights_dtype = DType::bf16;
      p.weight_row_stride = 1, p.weight_stride = n;
    }
    if (bagged) {
      for (int64_t at = 0; at < n; at += below(5)) bags.push_back(at);
      bags.push_back(n);
      bags.push_back(n);  // empty
      bags[0] = 0;
      p.bags = bags.data(), p.bag_count = static_cast<int64_t>(bags.size()) - 1;
      offsets = {bags.data(), DType::i64, p.bag_count, 1, 1, 1};
    }
    d_out = reals(p.outputs() * p.out_width(), dtype);
  }
  const Codes* device_offsets() const { return p.bags ? &offsets : nullptr; }
};

constexpr Combine kCombines[] = {Combine::concat, Combine::sum, Combine::mean, Combine::product};

void lookups(int64_t n, const std::vector<int64_t>& sizes, int64_t width, DType dtype,
             bool few = false) {
  for (Combine combine : kCombines)
    for (int options = 0; options < 4; ++options) {
      if (few && options != static_cast<int>(combine)) continue;
      const Case c(n, sizes, width, dtype, combine, options & 1, options & 2);
      const int64_t columns = c.p.subspaces();
      auto out = room<char>(c.d_out.size()), want = out;
      auto scratch = room<char>(cuda::lookup_scratch(columns));
      reference_lookup(c.p, want.data());
      cuda::lookup(stream, c.p, c.device_offsets(), out.data(), scratch.data());
      CHECK(out == want, n, width, options, static_cast<int>(combine));

      auto d_tables = room<float>(c.rows * width), d_tables_want = d_tables;
      auto d_weights = room<float>(n * columns), d_weights_want = d_weights;
      const LookupGradients g{c.d_out.data(), dtype, c.p.out_width(), d_tables_want.data(),
                              d_weights_want.data()};
      reference_lookup_backward(c.p, g);
      for (bool both : {true, false}) {
        auto memory = room<char>(cuda::lookup_backward_scratch(n, columns, c.rows, width, both));
        cuda::lookup_backward(stream, c.p, c.device_offsets(),
                              {c.d_out.data(), dtype, c.p.out_width(),
                               both ? d_tables.data() : nullptr, d_weights.data()},
                              memory.data());
      }
      CHECK(d_weights == d_weights_want, n, width, options, static_cast<int>(combine));
      float worst = 0;
      for (size_t i = 0; i < d_tables.size(); ++i)
        worst = std::max(
            worst, std::abs(d_tables[i] - d_tables_want[i]) / (1 + std::abs(d_tables_want[i])));
      CHECK(worst <= 1e-4f, n, width, options, static_cast<int>(combine), worst);
    }
}

// A code without a row gives NaN and no gradient, whatever the dtype.
void lost_codes() {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (bool weighted : {false, true}) {
      Case c(20, {5, 5}, 8, dtype, Combine::concat, weighted, false);
      c.codes[6] = 5;
      c.codes[9] = -1;
      auto out = room<char>(c.d_out.size());
      auto scratch = room<char>(cuda::lookup_scratch(2));
      cuda::lookup(stream, c.p, nullptr, out.data(), scratch.data());
      for (int i = 0; i < 20 * 16; ++i)
        CHECK(std::isnan(read_real(out.data(), dtype, i)) == (i / 8 == 6 || i / 8 == 9), i);
      auto d_tables = room<float>(80), d_weights = room<float>(40);
      auto memory = room<char>(cuda::lookup_backward_scratch(20, 2, 10, 8, true));
      cuda::lookup_backward(stream, c.p, nullptr,
                            {c.d_out.data(), dtype, 16, d_tables.data(), d_weights.data()},
                            memory.data());
      for (float sum : d_tables) CHECK(std::isfinite(sum));
      for (int i = 0; i < 40; ++i) CHECK(std::isnan(d_weights[i]) == (i == 6 || i == 9), i);
    }
}

// Offsets beyond the rows are brought into them.
void lost_offsets() {
  Case c(6, {3}, 4, DType::f32, Combine::sum, false, true);
  std::vector<int32_t> bad = {-3, 0, 4, 0, 2, 0, 99, 0};
  const Codes offsets{bad.data(), DType::i32, 4, 1, 2, 1};
  auto out = room<float>(16);
  cuda::lookup(stream, c.p, &offsets, out.data(), room<char>(cuda::lookup_scratch(1)).data());
  for (float x : out) CHECK(std::isfinite(x));
  auto d_out = room<float>(16), d_tables = room<float>(12);
  auto memory = room<char>(cuda::lookup_backward_scratch(6, 1, 3, 4, true));
  cuda::lookup_backward(stream, c.p, &offsets,
                        {d_out.data(), DType::f32, 4, d_tables.data(), nullptr}, memory.data());
  for (float x : d_tables) CHECK(x == 0);
}

// --- Table sums -----------------------------------------------------------------------------------

void table_sums(int64_t queries, int64_t n, int64_t columns, int64_t levels, int64_t width) {
  auto q = room<float>(queries * columns * width * 2);
  auto books = room<float>(columns * levels * width);
  for (float& x : q) x = static_cast<float>(below(2000)) / 100 - 10;
  for (float& x : books) x = static_cast<float>(below(2000)) / 100 - 10;
  auto codes = room<uint16_t>(n * columns);
  for (uint16_t& c : codes) c = static_cast<uint16_t>(below(levels));
  const Codes view{codes.data(), DType::u16, n, columns, 1, n};
  for (bool product : {false, true}) {
    const ScoreTables p{DType::f32,
                        queries,
                        columns,
                        levels,
                        width,
                        q.data(),
                        2 * columns * width,
                        2,
                        books.data(),
                        {levels * width, 1, levels},
                        product};
    auto tables = room<float>(queries * columns * levels), tables_want = tables;
    cuda::score_tables(stream, p, tables.data());
    score_tables(p, tables_want.data());
    CHECK(tables == tables_want, queries, levels);
    auto out = room<float>(queries * n), want = out;
    cuda::table_sum(stream, tables.data(), queries, levels, view, out.data());
    table_sum("test", tables.data(), DType::f32, queries, levels, view, want.data());
    CHECK(out == want, queries, n, columns, levels);

    auto d_tables = tables, d_tables_want = tables;
    auto scratch = room<char>(cuda::table_sum_backward_scratch(n, columns, queries, levels));
    cuda::table_sum_backward(stream, out.data(), 1, queries, queries, levels, view, d_tables.data(),
                             scratch.data());
    table_sum_backward("test", out.data(), DType::f32, 1, queries, queries, levels, view,
                       d_tables_want.data());
    for (size_t i = 0; i < d_tables.size(); ++i)
      CHECK(std::abs(d_tables[i] - d_tables_want[i]) <=
                1e-4f * static_cast<float>(n) * (10 + std::abs(d_tables_want[i])) / 100,
            i, d_tables[i], d_tables_want[i]);
  }
}

// --- Assignment -----------------------------------------------------------------------------------

// Integers, where many rows are equally near, or normal numbers.
void assignment(int64_t n, int64_t books, int64_t centroids, int64_t dim, DType dtype, bool ties,
                const std::vector<int64_t>& tops) {
  auto x = reals(n * books * dim, dtype), c = reals(books * centroids * dim, DType::f32);
  if (ties) {
    for (int64_t i = 0; i < n * books * dim; ++i)
      write_real(x.data(), dtype, i, static_cast<double>(below(3)));
    for (int64_t i = 0; i < books * centroids * dim; ++i)
      write_real(c.data(), DType::f32, i, static_cast<double>(below(3)) * 0.5);
  }
  const Array3 rows{x.data(), dtype, {n, books, dim}, {1, n * dim, n}};
  const Array3 words{
      c.data(), DType::f32, {books, centroids, dim}, {centroids * dim, 1, centroids}};
  for (Nearest metric : {Nearest::l2, Nearest::ip, Nearest::cosine})
    for (int64_t top : tops) {
      const int64_t count = n * books * top;
      auto codes = room<int32_t>(count), want = codes;
      auto costs = room<float>(count), costs_want = costs;
      auto scratch = room<char>(cuda::assign_scratch(n, books, centroids, dim, top));
      cuda::assign(stream, rows, words, metric, {codes.data(), true, top, costs.data()},
                   scratch.data());
      assign_reference(rows, words, metric, {want.data(), true, top, costs_want.data()});
      CHECK(codes == want, n, books, centroids, dim, top, static_cast<int>(metric));
      CHECK(costs == costs_want, n, books, centroids, dim, top, static_cast<int>(metric));
      if (centroids > 256) continue;
      auto bytes = room<uint8_t>(count);
      cuda::assign(stream, rows, words, metric, {bytes.data(), false, top, nullptr},
                   scratch.data());
      for (int64_t i = 0; i < count; ++i) CHECK(bytes[i] == want[i], i);
    }
}

// --- Codes ----------------------------------------------------------------------------------------

void integers() {
  for (int nbits = 1; nbits <= 16; ++nbits) {
    const int64_t n = 9, columns = 7, bytes = ceil_div(columns * nbits, 8);
    auto codes = room<int32_t>(n * columns);
    for (int32_t& c : codes) c = static_cast<int32_t>(below(int64_t{1} << nbits));
    const Codes view{codes.data(), DType::i32, n, columns, 1, n};
    auto packed = room<uint8_t>(n * bytes), want = packed;
    cuda::pack_codes(stream, view, nbits, packed.data());
    pack_codes("test", view, nbits, want.data());
    CHECK(packed == want, nbits);
    auto out = room<char>(n * columns * (nbits <= 8 ? 1 : 4)), out_want = out;
    cuda::unpack_codes(stream, packed.data(), bytes, 1, n, columns, nbits, out.data());
    unpack_codes(packed.data(), bytes, 1, n, columns, nbits, out_want.data());
    CHECK(out == out_want, nbits);
  }
  const std::vector<int64_t> ids = {0, -1, -5, 123456789, 2, 3, 1 << 20};
  std::vector<uint64_t> seeds(40);
  std::vector<int64_t> sizes(40);
  for (int h = 0; h < 40; ++h) seeds[h] = h * h - 3, sizes[h] = 1 + 1000 * h;
  const Codes view{ids.data(), DType::i64, 7, 1, 1, 1};
  auto out = room<int64_t>(7 * 40), want = out;
  cuda::hash_codes(stream, view, seeds.data(), sizes.data(), 40, out.data());
  hash_codes(view, seeds.data(), sizes.data(), 40, want.data());
  CHECK(out == want);
  const Codes rising{ids.data() + 3, DType::i64, 4, 1, 1, 1};
  out.assign(4 * 40, 0), want = out;
  cuda::digits(stream, rising, sizes.data(), 40, out.data());
  digits("test", rising, sizes.data(), 40, want.data());
  CHECK(out == want);
}

}  // namespace

int main() {
  in_every_order([] {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      lookups(40, {7, 20, 2}, 8, dtype, dtype != DType::f32);
      lookups(33, {3}, 5, dtype, true);
    }
    lookups(300, {2, 65600}, 1, DType::f32, true);  // chunks of sums; three passes of the sort
    lookups(2100, {1}, 1, DType::f32, true);
    lookups(3, std::vector<int64_t>(70, 2), 3, DType::f32,
            true);  // tables beyond one kernel's arguments
    lookups(9, {4}, 300, DType::f32, true);
    lookups(0, {4}, 3, DType::f32);
    lost_codes();
    lost_offsets();
    table_sums(3, 50, 5, 16, 3);
    table_sums(1, 1100, 2, 300, 1);
    table_sums(1, 30, 2, 8200, 1);  // tables beyond shared memory
    table_sums(0, 5, 2, 4, 1);
    table_sums(2, 0, 2, 4, 1);
    for (bool ties : {false, true}) {
      assignment(70, 2, 130, 19, DType::f32, ties, {1});
      assignment(5, 3, 7, 4, DType::bf16, ties, {1, 3, 7});
      assignment(2, 1, 300, 2, DType::f16, ties, {1, 300});
    }
    assignment(0, 2, 3, 4, DType::f32, false, {1, 2});
    integers();
  });
  return report();
}
