// SPDX-License-Identifier: Apache-2.0
// The definitions of lookup.h, one number at a time. They serve float64, and the tests.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/reals.h"
#include "pq/lookup.h"

namespace pentad::pq {
namespace {

// What a code of this type is as an int64; numbers beyond every table become -1.
template <class T>
int64_t code_at(const Codes& codes, int64_t row, int64_t column) {
  const T* data = static_cast<const T*>(codes.data);
  const T code = data[row * codes.row_stride + column * codes.column_stride];
  if (sizeof(T) == 8 && static_cast<uint64_t>(code) > static_cast<uint64_t>(kMostTableRows))
    return -1;
  return static_cast<int64_t>(code);
}

template <class T>
std::string code_text(const Codes& codes, int64_t row, int64_t column) {
  const T* data = static_cast<const T*>(codes.data);
  return std::to_string(data[row * codes.row_stride + column * codes.column_stride]);
}

template <class Real>  // float, or double beside float64 tables
struct Definition {
  const Lookup& p;

  int64_t first(int64_t b) const { return p.bags ? p.bags[b] : b; }
  int64_t last(int64_t b) const { return p.bags ? p.bags[b + 1] : b + 1; }
  Real weight(int64_t i, int64_t m) const {
    if (!p.weights) return 1;
    return static_cast<Real>(
        read_real(p.weights, p.weights_dtype, i * p.weight_row_stride + m * p.weight_stride));
  }
  Real entry(int64_t i, int64_t m, int64_t d) const {
    const Table& table = p.tables[m];
    const char* row = table.base + read_code(p.codes, i, m) * table.step;
    return static_cast<Real>(read_real(row, p.dtype, d));
  }
  Real term(int64_t i, int64_t m, int64_t d) const { return weight(i, m) * entry(i, m, d); }

  void forward(int64_t b, void* out) const {
    const int64_t columns = p.subspaces(), to = b * p.out_width();
    for (int64_t d = 0; d < p.out_width(); ++d) {
      Real sum = 0;
      for (int64_t i = first(b); i < last(b); ++i) {
        if (p.combine == Combine::concat) {
          sum += term(i, d / p.width, d % p.width);
        } else if (p.combine == Combine::product) {
          Real product = 1;
          for (int64_t m = 0; m < columns; ++m) product *= term(i, m, d);
          sum += product;
        } else {
          for (int64_t m = 0; m < columns; ++m) sum += term(i, m, d);
        }
      }
      if (p.combine == Combine::mean && first(b) < last(b))
        sum /= static_cast<Real>((last(b) - first(b)) * columns);
      write_real(out, p.dtype, to + d, sum);
    }
  }

  Real rest(int64_t i, int64_t m, int64_t d) const {
    if (p.combine != Combine::product) return 1;
    Real left = 1, right = 1;
    for (int64_t j = 0; j < m; ++j) left *= term(i, j, d);
    for (int64_t j = p.subspaces() - 1; j > m; --j) right *= term(i, j, d);
    return left * right;
  }

  void backward(const LookupGradients& g) const {
    const int64_t columns = p.subspaces(), width = p.width;
    Real *d_tables = static_cast<Real*>(g.d_tables), *d_weights = static_cast<Real*>(g.d_weights);
    int64_t rows = 0;
    for (const Table& table : p.tables) rows += table.rows;
    if (d_tables) std::fill_n(d_tables, rows * width, Real{0});
    for (int64_t b = 0; b < p.outputs(); ++b) {
      const Real scale = p.combine == Combine::mean
                             ? Real{1} / static_cast<Real>((last(b) - first(b)) * columns)
                             : Real{1};
      for (int64_t i = first(b); i < last(b); ++i) {
        int64_t base = 0;
        for (int64_t m = 0; m < columns; base += p.tables[m++].rows) {
          Real lanes[16] = {};
          const int64_t from = p.combine == Combine::concat ? m * width : 0;
          for (int64_t d = 0; d < width; ++d) {
            const Real grad =
                static_cast<Real>(read_real(g.d_out, g.dtype, b * g.row_stride + from + d)) *
                rest(i, m, d);
            if (d_tables)
              d_tables[(base + read_code(p.codes, i, m)) * width + d] +=
                  grad * (weight(i, m) * scale);
            lanes[d % 16] += grad * entry(i, m, d);
          }
          for (int half = 8; half; half /= 2)
            for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
          if (d_weights) d_weights[i * columns + m] = lanes[0] * scale;
        }
      }
    }
  }
};

}  // namespace

int64_t read_code(const Codes& codes, int64_t row, int64_t column) {
  switch (codes.dtype) {
    case DType::u8: return code_at<uint8_t>(codes, row, column);
    case DType::i8: return code_at<int8_t>(codes, row, column);
    case DType::u16: return code_at<uint16_t>(codes, row, column);
    case DType::i16: return code_at<int16_t>(codes, row, column);
    case DType::u32: return code_at<uint32_t>(codes, row, column);
    case DType::i32: return code_at<int32_t>(codes, row, column);
    case DType::u64: return code_at<uint64_t>(codes, row, column);
    default: return code_at<int64_t>(codes, row, column);
  }
}

void refuse_codes(const char* op, const Codes& codes, const int64_t* sizes) {
  for (int64_t i = 0; i < codes.rows; ++i)
    for (int64_t m = 0; m < codes.columns; ++m) {
      const int64_t code = read_code(codes, i, m);
      if (code >= 0 && code < sizes[m]) continue;
      const std::string text = codes.dtype == DType::u64   ? code_text<uint64_t>(codes, i, m)
                               : codes.dtype == DType::i64 ? code_text<int64_t>(codes, i, m)
                                                           : std::to_string(code);
      throw std::invalid_argument("[" + std::string(op) + "] codes hold " + text + " in row " +
                                  std::to_string(i) + ", column " + std::to_string(m) +
                                  ", expected 0 to " + std::to_string(sizes[m] - 1));
    }
}

void reference_lookup(const Lookup& p, void* out) {
  std::vector<int64_t> sizes;
  for (const Table& table : p.tables) sizes.push_back(table.rows);
  refuse_codes(p.op, p.codes, sizes.data());
  parallel_for(p.outputs(), [&](int64_t b) {
    if (p.dtype == DType::f64) Definition<double>{p}.forward(b, out);
    else Definition<float>{p}.forward(b, out);
  });
}

void reference_lookup_backward(const Lookup& p, const LookupGradients& g) {
  std::vector<int64_t> sizes;
  for (const Table& table : p.tables) sizes.push_back(table.rows);
  refuse_codes(p.op, p.codes, sizes.data());
  if (p.dtype == DType::f64) Definition<double>{p}.backward(g);
  else Definition<float>{p}.backward(g);
}

}  // namespace pentad::pq
