// SPDX-License-Identifier: Apache-2.0
// Lookups of every level against the definition, bit for bit; table sums against plain loops.
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/reals.h"
#include "pq/codes.h"
#include "pq/lookup.h"
#include "pq/table_sum.h"

using namespace pentad;
using namespace pentad::pq;

namespace {

std::mt19937 generator(1);

int64_t below(int64_t n) { return generator() % n; }

// Normal numbers as memory of a dtype.
std::vector<char> reals(int64_t n, DType dtype) {
  std::normal_distribution<double> normal;
  std::vector<char> data(n * size_of(dtype));
  for (int64_t i = 0; i < n; ++i) write_real(data.data(), dtype, i, normal(generator));
  return data;
}

struct Case {
  Lookup p;
  std::vector<int64_t> codes, bags;
  std::vector<std::vector<char>> tables;
  std::vector<char> weights, d_out;
  int64_t rows = 0;  // of the tables

  Case(int64_t n, std::vector<int64_t> sizes, int64_t width, DType dtype, Combine combine,
       bool weighted, bool bagged) {
    const int64_t columns = static_cast<int64_t>(sizes.size()), size = size_of(dtype);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t levels : sizes) codes.push_back(below(levels));
    p.codes = {codes.data(), DType::i64, n, columns, columns, 1};
    for (int64_t levels : sizes) {
      tables.push_back(reals(levels * width, dtype));
      p.tables.push_back({tables.back().data(), levels, width * size});
      rows += levels;
    }
    p.width = width, p.dtype = dtype, p.combine = combine;
    if (weighted) {
      weights = reals(n * columns, dtype);
      p.weights = weights.data(), p.weights_dtype = dtype;
      p.weight_row_stride = columns, p.weight_stride = 1;
    }
    if (bagged) {
      for (int64_t at = 0; at < n; at += below(5)) bags.push_back(at);
      bags.push_back(n);
      bags.push_back(n);  // empty
      bags[0] = 0;
      p.bags = bags.data(), p.bag_count = static_cast<int64_t>(bags.size()) - 1;
    }
    d_out = reals(p.outputs() * p.out_width(), dtype);
  }

  using Results = std::vector<std::vector<char>>;
  template <class Forward, class Backward>
  Results run(Forward forward, Backward backward) {
    const int64_t wide = p.dtype == DType::f64 ? 8 : 4;
    Results r = {std::vector<char>(d_out.size(), 7), std::vector<char>(rows * p.width * wide, 7),
                 std::vector<char>(p.codes.rows * p.subspaces() * wide, 7)};
    forward(p, r[0].data());
    backward(p, LookupGradients{d_out.data(), p.dtype, p.out_width(), r[1].data(), r[2].data()});
    return r;
  }
};

void lookups_have_the_bits_of_the_definition() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (Combine combine : {Combine::concat, Combine::sum, Combine::mean, Combine::product})
      for (int64_t width : {1, 2, 5, 8, 16, 40, 67})
        for (int options = 0; options < 4; ++options) {
          Case c(23, {5, 1, 300}, width, dtype, combine, options & 1, options & 2);
          // The definition adds to zero; copies do not, and only the sign of a zero may differ.
          const auto want = c.run(reference_lookup, reference_lookup_backward);
          for (Isa level : isa_available()) {
            set_isa(level);
            for (int threads : {1, 3}) {
              set_num_threads(threads);
              const auto got = c.run(lookup, lookup_backward);
              for (int i = 0; i < 3; ++i)
                CHECK(got[i] == want[i], name(level), static_cast<int>(dtype),
                      static_cast<int>(combine), width, options, threads, i);
            }
          }
        }
}

void cut_work_has_the_bits_of_the_definition() {
  // Copies past the caches; columns, then rows of a table cut among threads.
  for (auto [n, sizes, width] :
       {std::tuple<int64_t, std::vector<int64_t>, int64_t>{40000, {9, 7, 5}, 20},
        {9000, {3}, 100},
        {70000, {1000}, 3},
        {30000, {4, 4}, 16}})
    for (Combine combine : {Combine::concat, Combine::product}) {
      Case c(n, sizes, width, DType::f32, combine, combine == Combine::product, false);
      const auto want = c.run(reference_lookup, reference_lookup_backward);
      for (Isa level : isa_available()) {
        set_isa(level);
        for (int threads : {1, 2, 5}) {
          set_num_threads(threads);
          const auto got = c.run(lookup, lookup_backward);
          for (int i = 0; i < 3; ++i) CHECK(got[i] == want[i], name(level), n, width, threads, i);
        }
      }
    }
}

void bad_codes_are_refused() {
  for (DType dtype : {DType::f32, DType::f64})
    for (int64_t bad : {int64_t{-1}, int64_t{5}, int64_t{1} << 40}) {
      Case c(2000, {5, 5}, 4, dtype, Combine::concat, false, false);
      c.codes[3001] = bad;
      bool thrown = false;
      try {
        c.run(lookup, lookup_backward);
      } catch (const std::invalid_argument& error) {
        thrown = std::strstr(error.what(), "in row 1500, column 1");
      }
      CHECK(thrown, bad);
    }
}

void table_sums_are_sequential() {
  for (int64_t columns : {1, 7, 16})
    for (int64_t n : {1, 6, 5001}) {
      const int64_t queries = 3, levels = 256;
      const auto memory = reals(queries * columns * levels, DType::f32);
      const float* tables = reinterpret_cast<const float*>(memory.data());
      std::vector<uint8_t> codes(n * columns);
      for (uint8_t& code : codes) code = static_cast<uint8_t>(generator());
      const Codes view = {codes.data(), DType::u8, n, columns, columns, 1};
      std::vector<float> out(queries * n), d_tables(queries * columns * levels, 7);
      for (int threads : {1, 3}) {
        set_num_threads(threads);
        table_sum("test", tables, DType::f32, queries, levels, view, out.data());
        table_sum_backward("test", out.data(), DType::f32, n, 1, queries, levels, view,
                           d_tables.data());
        std::vector<float> sums(d_tables.size());
        for (int64_t q = 0; q < queries; ++q)
          for (int64_t i = 0; i < n; ++i) {
            float sum = 0;
            for (int64_t m = 0; m < columns; ++m) {
              const int64_t at = (q * columns + m) * levels + codes[i * columns + m];
              sum += tables[at];
              sums[at] += out[q * n + i];
            }
            CHECK(out[q * n + i] == sum, columns, n, q, i);
          }
        CHECK(d_tables == sums, columns, n, threads);
      }
    }
}

void codes_are_packed_and_unpacked() {
  for (int nbits = 1; nbits <= kMostBits; ++nbits)
    for (int64_t columns : {1, 5, 64}) {
      const int64_t n = 4100, bytes = (columns * nbits + 7) / 8;
      std::vector<int32_t> codes(n * columns), wide(n * columns);
      for (int32_t& code : codes) code = static_cast<int32_t>(below(int64_t{1} << nbits));
      std::vector<uint8_t> packed(n * bytes), narrow(n * columns);
      pack_codes("test", {codes.data(), DType::i32, n, columns, columns, 1}, nbits, packed.data());
      void* out = nbits <= 8 ? static_cast<void*>(narrow.data()) : wide.data();
      unpack_codes(packed.data(), bytes, 1, n, columns, nbits, out);
      bool same = true;
      for (int64_t i = 0; i < n * columns; ++i) {
        const int64_t bit = i % columns * nbits, row = i / columns * bytes;
        int32_t code = 0;
        for (int b = 0; b < nbits; ++b)
          code |= (packed[row + (bit + b) / 8] >> (bit + b) % 8 & 1) << b;
        same &= code == codes[i] && (nbits <= 8 ? narrow[i] : wide[i]) == codes[i];
      }
      CHECK(same, nbits, columns);
    }
}

}  // namespace

int main() {
  lookups_have_the_bits_of_the_definition();
  cut_work_has_the_bits_of_the_definition();
  bad_codes_are_refused();
  table_sums_are_sequential();
  codes_are_packed_and_unpacked();
  return report();
}
