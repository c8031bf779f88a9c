// SPDX-License-Identifier: Apache-2.0
// Random attention problems whose arrays end where their memory ends.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"

namespace pentad::attention::test {

inline std::mt19937 generator(11);

inline int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline bool chance(double p) { return std::bernoulli_distribution(p)(generator); }

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::boolean: return 1;
    default: return 2;
  }
}

inline double decode(const void* at, DType dtype) {
  if (dtype == DType::boolean) return *static_cast<const uint8_t*>(at);
  if (dtype == DType::f64) return *static_cast<const double*>(at);
  if (dtype == DType::f32) return *static_cast<const float*>(at);
  const int bits = *static_cast<const uint16_t*>(at);
  const int fraction_bits = dtype == DType::bf16 ? 7 : 10, bias = dtype == DType::bf16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

// Stores x, or a 16-bit number near it (towards zero; |x| < 2^15).
inline void encode(void* at, DType dtype, double x) {
  if (dtype == DType::boolean) *static_cast<uint8_t*>(at) = x != 0;
  if (dtype == DType::f64) *static_cast<double*>(at) = x;
  if (dtype == DType::f32) *static_cast<float*>(at) = static_cast<float>(x);
  if (dtype != DType::bf16 && dtype != DType::f16) return;
  const int fraction_bits = dtype == DType::bf16 ? 7 : 10, bias = dtype == DType::bf16 ? 127 : 15;
  int bits = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    bits = 0x7fff;
  } else if (std::isinf(x)) {
    bits |= (2 * bias + 1) << fraction_bits;
  } else if (x != 0) {
    const int exponent = std::max(std::ilogb(x), 1 - bias);
    bits += (exponent + bias - 1) << fraction_bits;
    bits += static_cast<int>(std::ldexp(std::abs(x), fraction_bits - exponent));
  }
  *static_cast<uint16_t*>(at) = static_cast<uint16_t>(bits);
}

// An array (b, h, s, d) in one of several layouts.
struct Array {
  enum Layout { plain, transposed, gaps, reversed, columns, layouts };

  Operand operand;
  std::vector<uint8_t> memory;
  int64_t shape[4] = {};

  Array() = default;
  Array(DType dtype, int64_t b, int64_t h, int64_t s, int64_t d, int layout = plain,
        bool shared_batch = false)
      : shape{b, h, s, d} {
    const int orders[layouts][4] = {
        {0, 1, 2, 3}, {0, 2, 1, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 3, 2}};
    int64_t step = layout == gaps ? 2 : 1;
    for (int n = 3; n >= 0; --n) {
      const int dimension = orders[layout][n];
      operand.stride[dimension] = step;
      if (dimension == 0 && shared_batch) operand.stride[0] = 0;
      else step *= shape[dimension];
    }
    memory.resize(step * bytes_of(dtype));
    operand.dtype = dtype;
    if (layout == reversed) {
      start_ = (s - 1) * operand.stride[2];
      operand.stride[2] = -operand.stride[2];
    }
    if (b * h * s * d == 0) memory.clear(), start_ = 0;
    place();
    for (size_t i = 0; i < memory.size(); i += bytes_of(dtype)) encode(&memory[i], dtype, 7.5);
  }
  Array(const Array& other)
      : operand(other.operand), memory(other.memory), shape{}, start_(other.start_) {
    std::copy(other.shape, other.shape + 4, shape);
    place();
  }
  Array& operator=(const Array& other) {
    operand = other.operand, memory = other.memory, start_ = other.start_;
    std::copy(other.shape, other.shape + 4, shape);
    place();
    return *this;
  }

  void* at(int64_t b, int64_t h, int64_t s, int64_t d) {
    const int64_t* stride = operand.stride;
    return static_cast<uint8_t*>(operand.data) +
           (b * stride[0] + h * stride[1] + s * stride[2] + d * stride[3]) *
               bytes_of(operand.dtype);
  }
  // Calls f(b, h, s, d) for every element.
  template <class F>
  void each(F f) {
    for (int64_t b = 0; b < shape[0]; ++b)
      for (int64_t h = 0; h < shape[1]; ++h)
        for (int64_t s = 0; s < shape[2]; ++s)
          for (int64_t d = 0; d < shape[3]; ++d) f(b, h, s, d);
  }
  void fill_normal(double deviation = 1) {
    std::normal_distribution<double> normal(0, deviation);
    each([&](int64_t b, int64_t h, int64_t s, int64_t d) {
      encode(at(b, h, s, d), operand.dtype, normal(generator));
    });
  }
  int64_t size() const { return static_cast<int64_t>(memory.size()) / bytes_of(operand.dtype); }
  double value(int64_t i) const {
    return decode(&memory[i * bytes_of(operand.dtype)], operand.dtype);
  }

 private:
  void place() {
    operand.data = memory.empty() ? nullptr : memory.data() + start_ * bytes_of(operand.dtype);
  }
  int64_t start_ = 0;
};

struct Lists {
  std::vector<int64_t> row_ptr, col_ptr;
  std::vector<int32_t> cols, kinds, rows, row_kinds;
  std::vector<uint8_t> partial;
  BlockMask mask;

  // Random blocks: absent, full or one of three partial ones.
  Lists(int64_t batch, int64_t heads, int64_t nq, int64_t nk) {
    const int64_t sizes[] = {1, 7, 16, 24, 32, 64, 64, 128};
    mask.q_block = sizes[pick(nq > 30, 7)];
    mask.k_block = sizes[pick(nk > 30, 7)];
    mask.q_blocks = (nq + mask.q_block - 1) / mask.q_block;
    mask.k_blocks = (nk + mask.k_block - 1) / mask.k_block;
    mask.batch = chance(0.5) ? batch : 1;
    mask.heads = chance(0.5) ? heads : 1;
    partial.resize(3 * mask.q_block * mask.k_block);
    for (uint8_t& x : partial) x = chance(0.6);
    for (int64_t pair = 0; pair < mask.batch * mask.heads; ++pair) {
      const double density = chance(0.5) ? 0.3 : 0.8;
      std::vector<std::vector<std::pair<int32_t, int32_t>>> columns(mask.k_blocks);
      for (int32_t i = 0; i < mask.q_blocks; ++i) {
        row_ptr.push_back(cols.size());
        for (int32_t j = 0; j < mask.k_blocks; ++j) {
          if (!chance(density)) continue;
          cols.push_back(j);
          kinds.push_back(static_cast<int32_t>(pick(-1, 2)));
          columns[j].push_back({i, kinds.back()});
        }
      }
      row_ptr.push_back(cols.size());
      for (const auto& column : columns) {
        col_ptr.push_back(rows.size());
        for (const auto& [row, kind] : column) rows.push_back(row), row_kinds.push_back(kind);
      }
      col_ptr.push_back(rows.size());
    }
    mask.row_ptr = row_ptr.data(), mask.col_ptr = col_ptr.data();
    mask.cols = cols.data(), mask.kinds = kinds.data();
    mask.rows = rows.data(), mask.row_kinds = row_kinds.data();
    mask.partial = partial.data();
  }
};

struct Case {
  Problem p;
  Array q, k, v, bias, key_bias, alibi, sink;
  std::unique_ptr<Lists> lists;
  std::string options;
  bool cached = false;
  bool bias_per_query = false;  // its gradient can be asked for

  bool packed() const { return !p.q_begin.empty(); }
  DType small() const { return p.q.dtype == DType::f64 ? DType::f64 : DType::f32; }
  // An array over queries or keys as the problem has them.
  Array rows(bool keys, int64_t dim, int layout) const {
    const int64_t heads = keys ? p.kv_heads : p.heads;
    if (packed())
      return {p.q.dtype, 1, heads, keys ? p.k_begin.back() : p.q_begin.back(), dim, layout};
    return {p.q.dtype, p.batch, heads, keys ? p.max_k : p.max_q, dim, layout};
  }
  Array row_statistics() const {
    if (packed()) return {small(), 1, p.heads, p.q_begin.back(), 1};
    return {small(), p.batch, p.heads, p.max_q, 1};
  }
  Array key_statistics(int64_t heads) const {
    if (packed()) return {small(), 1, heads, p.k_begin.back(), 1};
    return {small(), p.batch, heads, p.max_k, 1};
  }
};

// `cached`: keys in caches with lengths, for forward alone.
inline std::unique_ptr<Case> random_case(DType dtype, int64_t most_rows, int64_t most_dim,
                                         bool cached) {
  auto c = std::make_unique<Case>();
  Problem& p = c->p;
  const auto option = [&](const char* name, double probability) {
    const bool chosen = chance(probability);
    if (chosen) c->options += std::string(" ") + name;
    return chosen;
  };
  c->cached = cached;
  if (cached) c->options += " cached";
  p.batch = chance(0.03) ? 0 : pick(1, 3);
  p.kv_heads = pick(1, 3);
  p.heads = p.kv_heads * (chance(0.5) ? 1 : pick(2, 5));
  p.dim = pick(1, most_dim);
  p.value_dim = chance(0.6) ? p.dim : pick(1, most_dim);
  const bool packed = !cached && option("packed", 0.25);
  const auto rows = [&] { return chance(0.03) ? 0 : pick(1, most_rows); };
  if (packed) {
    p.q_begin = {0}, p.k_begin = {0};
    for (int64_t b = 0; b < p.batch; ++b) {
      p.q_begin.push_back(p.q_begin.back() + rows());
      p.k_begin.push_back(p.k_begin.back() + rows());
      p.max_q = std::max(p.max_q, p.q_begin[b + 1] - p.q_begin[b]);
      p.max_k = std::max(p.max_k, p.k_begin[b + 1] - p.k_begin[b]);
    }
  } else {
    p.max_q = cached && chance(0.7) ? pick(1, 5) : rows();
    p.max_k = rows();
  }

  const auto layout = [] { return static_cast<int>(pick(0, Array::layouts - 1)); };
  p.q.dtype = dtype;
  c->q = c->rows(false, p.dim, layout());
  if (cached) {
    const bool paged = option("paged", 0.5);
    int64_t rows_in_use = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      p.k_length.push_back(pick(0, p.max_k));
      rows_in_use = std::max(rows_in_use, p.k_length.back());
    }
    p.max_k = rows_in_use;
    int64_t cache_rows = p.batch, capacity = p.max_k;
    if (paged) {
      const int64_t sizes[] = {1, 5, 16, 64, 100};
      p.page_size = sizes[pick(p.max_k > 40, 4)];
      p.pages_per_sequence = p.max_k / p.page_size + pick(1, 2);
      cache_rows = p.batch * p.pages_per_sequence + 2;
      for (int64_t n = 0; n < p.batch * p.pages_per_sequence; ++n)
        p.block_table.push_back(static_cast<int32_t>(n + 1));
      std::shuffle(p.block_table.begin(), p.block_table.end(), generator);
      capacity = p.page_size;
    } else {
      if (option("left_pad", 0.4))
        for (int64_t b = 0; b < p.batch; ++b) p.left_pad.push_back(pick(0, 9));
      capacity += p.left_pad.empty() ? 2 : 10;
      if (option("cache_row", 0.4)) {
        cache_rows += 2;
        for (int64_t b = 0; b < p.batch; ++b) p.cache_row.push_back(pick(0, cache_rows - 1));
      }
    }
    c->k = {dtype, cache_rows, p.kv_heads, capacity, p.dim, layout()};
    c->v = {dtype, cache_rows, p.kv_heads, capacity, p.value_dim, layout()};
  } else {
    const bool shared = !packed && option("shared_keys", 0.05);
    c->k = c->rows(true, p.dim, layout());
    c->v = c->rows(true, p.value_dim, layout());
    if (shared) c->k = {dtype, p.batch, p.kv_heads, p.max_k, p.dim, layout(), true};
  }
  c->q.fill_normal();
  c->k.fill_normal();
  c->v.fill_normal();
  p.q = c->q.operand, p.k = c->k.operand, p.v = c->v.operand;

  p.scale = chance(0.5) ? 1 / std::sqrt(static_cast<double>(p.dim)) : 0.1 * pick(-1, 3);
  if (option("causal", 0.4)) p.right = 0;
  p.top_left = option("top_left", 0.25);
  if (option("left", 0.3)) p.left = pick(0, most_rows);
  if (p.right && option("right", 0.2)) p.right = pick(0, most_rows);
  if (option("softcap", 0.25)) p.softcap = 0.5 * static_cast<double>(pick(1, 6));
  if (option("dropout", 0.25)) {
    p.dropout = 0.1 * static_cast<double>(pick(1, 9));
    p.seed = generator() * uint64_t{0x100000001};
  }
  if (!packed && option("bias", 0.4)) {
    const DType dtypes[] = {DType::f32, DType::f32,     DType::bf16,
                            DType::f16, DType::boolean, c->small()};
    const DType bias_dtype = dtypes[pick(0, 5)];
    const int64_t full[] = {p.batch, p.heads, p.max_q, p.max_k};
    int64_t shape[4];
    for (int i = 0; i < 4; ++i) shape[i] = chance(0.3) ? 1 : full[i];
    c->bias = {bias_dtype, shape[0], shape[1], shape[2], shape[3], layout()};
    c->bias.fill_normal();
    const int64_t blind = chance(0.5) ? pick(0, shape[2]) : -1;  // a query that sees -inf alone
    c->bias.each([&](int64_t b, int64_t h, int64_t s, int64_t d) {
      if (bias_dtype == DType::boolean) encode(c->bias.at(b, h, s, d), bias_dtype, chance(0.7));
      else if (s == blind || chance(0.05)) encode(c->bias.at(b, h, s, d), bias_dtype, -INFINITY);
    });
    p.bias = c->bias.operand;
    for (int i = 0; i < 4; ++i)
      if (shape[i] == 1) p.bias.stride[i] = 0;
    c->bias_per_query = bias_dtype != DType::boolean && shape[2] == p.max_q;
  }
  if (option("key_bias", 0.3)) {
    c->key_bias = c->key_statistics(chance(0.5) ? p.heads : p.kv_heads);
    c->key_bias.fill_normal();
    p.key_bias = c->key_bias.operand.data;
    p.key_bias_heads = c->key_bias.shape[1];
    std::copy(c->key_bias.operand.stride, c->key_bias.operand.stride + 3, p.key_bias_stride);
  }
  if (option("alibi", 0.25)) {
    const bool shared = chance(0.5);
    c->alibi = {c->small(), p.batch, p.heads, 1, 1, Array::plain, shared};
    c->alibi.each([&](int64_t b, int64_t h, int64_t, int64_t) {
      encode(c->alibi.at(b, h, 0, 0), c->small(), 0.01 * static_cast<double>(pick(0, 12)));
    });
    p.alibi = c->alibi.operand.data;
    p.alibi_stride[0] = c->alibi.operand.stride[0];
    p.alibi_stride[1] = c->alibi.operand.stride[1];
  }
  if (option("sink", 0.25)) {
    c->sink = {c->small(), 1, p.heads, 1, 1};
    c->sink.fill_normal();
    p.sink = c->sink.operand.data;
  }
  if (!packed && !cached && option("mask", 0.3)) {
    c->lists = std::make_unique<Lists>(p.batch, p.heads, p.max_q, p.max_k);
    p.mask = &c->lists->mask;
  }
  c->options += " b" + std::to_string(p.batch) + " h" + std::to_string(p.heads) + "/" +
                std::to_string(p.kv_heads) + " s" + std::to_string(p.max_q) + "/" +
                std::to_string(p.max_k) + " d" + std::to_string(p.dim) + "/" +
                std::to_string(p.value_dim);
  return c;
}

}  // namespace pentad::attention::test
