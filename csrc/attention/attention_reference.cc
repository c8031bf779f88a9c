// SPDX-License-Identifier: Apache-2.0
// The definition in attention.h, as loops. K and V become doubles once, which is linear in the
// sequence length; scores exist one row at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/attention.h"
#include "common/parallel.h"
#include "common/reals.h"

namespace pentad::attention {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Doubles = std::vector<double>;

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add(double* sum, double factor, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

// --- Where rows lie ------------------------------------------------------------------------------

// Row s of sequence b in a dense array, or in a packed one whose sequences begin at `begin`.
int64_t row_offset(const Operand& x, const std::vector<int64_t>& begin, int64_t b, int64_t h,
                   int64_t s) {
  if (!begin.empty()) return h * x.stride[1] + (begin[b] + s) * x.stride[2];
  return b * x.stride[0] + h * x.stride[1] + s * x.stride[2];
}

// Key or value j of sequence b: the same, or in a cache.
int64_t key_offset(const Problem& p, const Operand& x, int64_t b, int64_t h, int64_t j) {
  if (p.page_size) {
    const int64_t page = p.block_table[b * p.pages_per_sequence + j / p.page_size];
    return page * x.stride[0] + h * x.stride[1] + j % p.page_size * x.stride[2];
  }
  if (!p.left_pad.empty()) j += p.left_pad[b];
  return row_offset(x, p.k_begin, p.cache_row.empty() ? b : p.cache_row[b], h, j);
}

void read_row(const Operand& x, int64_t offset, int64_t n, double* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = read_real(x.data, x.dtype, offset + d * x.stride[3]);
}

void write_row(const Operand& x, int64_t offset, int64_t n, const double* row) {
  for (int64_t d = 0; d < n; ++d) write_real(x.data, x.dtype, offset + d * x.stride[3], row[d]);
}

// A contiguous array over keys: [batch][heads][max_k], or [heads][total keys] of packed sequences.
int64_t key_array_offset(const Problem& p, int64_t heads, int64_t b, int64_t h) {
  if (!p.k_begin.empty()) return h * p.k_begin.back() + p.k_begin[b];
  return (b * heads + h) * p.max_k;
}

// Waking threads costs more than a small problem.
template <class F>
void for_each_task(const Problem& p, int64_t tasks, const F& f) {
  if (p.batch * p.heads * p.max_q * p.max_k * (p.dim + p.value_dim) < 1 << 15)
    for (int64_t task = 0; task < tasks; ++task) f(task);
  else parallel_for(tasks, f);
}

// --- One row of scores ---------------------------------------------------------------------------

// Keys and values of one sequence and KV head.
struct Keys {
  Doubles k, v;
};

std::vector<Keys> read_keys(const Problem& p) {
  std::vector<Keys> keys(p.batch * p.kv_heads);
  for_each_task(p, p.batch * p.kv_heads, [&](int64_t task) {
    const int64_t b = task / p.kv_heads, h = task % p.kv_heads, n = p.k_len(b);
    keys[task].k.resize(n * p.dim);
    keys[task].v.resize(n * p.value_dim);
    for (int64_t j = 0; j < n; ++j) {
      read_row(p.k, key_offset(p, p.k, b, h, j), p.dim, &keys[task].k[j * p.dim]);
      read_row(p.v, key_offset(p, p.v, b, h, j), p.value_dim, &keys[task].v[j * p.value_dim]);
    }
  });
  return keys;
}

struct Row {
  const Problem& problem;
  DType small;  // of key_bias, alibi, sink
  int64_t b = 0, h = 0, i = 0, keys = 0;
  std::vector<uint8_t> visible;  // [keys]; the rest only where visible
  Doubles q, p, keep;            // keep: keep_ij / (1 - dropout)
  Doubles slope;                 // of the soft cap
  double lse = 0, sink = -kInfinity;

  explicit Row(const Problem& problem)
      : problem(problem), small(problem.q.dtype == DType::f64 ? DType::f64 : DType::f32) {}

  void find_visible() {
    const Problem& p = problem;
    visible.assign(keys, 0);
    const int64_t at = p.offset(b) + i;
    const int64_t first = std::max<int64_t>(0, at - p.left);
    const int64_t last = std::min(keys - 1, at + p.right);
    if (!p.mask) {
      for (int64_t j = first; j <= last; ++j) visible[j] = 1;
    } else {
      const BlockMask& m = *p.mask;
      const int64_t pair = (m.batch == 1 ? 0 : b) * m.heads + (m.heads == 1 ? 0 : h);
      const int64_t* row = m.row_ptr + pair * (m.q_blocks + 1) + i / m.q_block;
      for (int64_t n = row[0]; n < row[1]; ++n) {
        const int64_t begin = m.cols[n] * m.k_block;
        for (int64_t j = std::max(begin, first); j <= std::min(begin + m.k_block - 1, last); ++j)
          visible[j] = m.kinds[n] < 0 ||
                       m.partial[(m.kinds[n] * m.q_block + i % m.q_block) * m.k_block + j - begin];
      }
    }
    if (p.bias.data && p.bias.dtype == DType::boolean)
      for (int64_t j = first; j <= last; ++j)
        if (!static_cast<const uint8_t*>(p.bias.data)[bias_offset(j)]) visible[j] = 0;
  }

  int64_t bias_offset(int64_t j) const {
    const int64_t* stride = problem.bias.stride;
    return b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
  }

  // What is added to the capped score.
  double added(int64_t j) const {
    const Problem& p = problem;
    double sum = 0;
    if (p.bias.data && p.bias.dtype != DType::boolean)
      sum += read_real(p.bias.data, p.bias.dtype, bias_offset(j));
    if (p.key_bias) {
      const int64_t head = p.key_bias_heads == p.heads ? h : h / p.group();
      const int64_t* stride = p.key_bias_stride;
      sum += read_real(p.key_bias, small,
                       head * stride[1] + (p.k_begin.empty() ? b * stride[0] + j * stride[2]
                                                             : (p.k_begin[b] + j) * stride[2]));
    }
    if (p.alibi)
      sum -= read_real(p.alibi, small, b * p.alibi_stride[0] + h * p.alibi_stride[1]) *
             static_cast<double>(std::abs(i + p.offset(b) - j));
    return sum;
  }

  void draw_keep() {
    const Problem& p = problem;
    if (p.dropout <= 0) return keep.assign(keys, 1.0);
    keep.resize(keys);
    Philox bits{};
    for (int64_t j = 0; j < keys; ++j) {
      if (j % 4 == 0)
        bits = philox(p.seed, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i),
                      static_cast<uint32_t>(b * p.heads + h), 0);
      keep[j] = bits.word[j % 4] >= p.dropout * 0x1p32 ? 1 / (1 - p.dropout) : 0.0;
    }
  }

  // Fills everything for query `query` of sequence b and head h. A row without any weight, which
  // has lse = -inf, has p = 0.
  void solve(const Keys& source, int64_t batch, int64_t head, int64_t query) {
    const Problem& p = problem;
    b = batch, h = head, i = query, keys = p.k_len(b);
    find_visible();
    draw_keep();
    q.resize(p.dim);
    read_row(p.q, row_offset(p.q, p.q_begin, b, h, i), p.dim, q.data());
    this->p.assign(keys, 0.0);
    slope.assign(keys, 1.0);
    Doubles& s = this->p;
    if (p.sink) sink = read_real(p.sink, small, h);
    double most = sink;
    for (int64_t j = 0; j < keys; ++j) {
      if (!visible[j]) continue;
      const double x = p.scale * dot(q.data(), &source.k[j * p.dim], p.dim);
      s[j] = x;
      if (p.softcap > 0) {
        const double t = std::tanh(x / p.softcap);
        s[j] = p.softcap * t;
        slope[j] = 1 - t * t;
      }
      s[j] += added(j);
      if (std::isnan(s[j]) || s[j] > most) most = s[j];
      if (std::isnan(most)) break;  // and so is every p
    }
    lse = most;
    const double base = lse;
    double z = 1.0;  // p = exp(s - base) / z: a huge lse would round away log z
    if (std::isfinite(most)) {
      z = std::exp(sink - most);
      for (int64_t j = 0; j < keys; ++j)
        if (visible[j]) z += std::exp(s[j] - most);
      lse = most + std::log(z);
    }
    for (int64_t j = 0; j < keys; ++j)
      s[j] = visible[j] && lse != -kInfinity ? std::exp(s[j] - base) / z : 0.0;
  }
};

// The gradients of one row's scores, from what has been solved.
struct RowGradient {
  Doubles d_out, ds;
  double delta = 0;

  void solve(const Row& row, const Keys& source, const Gradients& g) {
    const Problem& p = row.problem;
    d_out.assign(p.value_dim, 0.0);
    if (g.d_out.data)
      read_row(g.d_out, row_offset(g.d_out, p.q_begin, row.b, row.h, row.i), p.value_dim,
               d_out.data());
    ds.assign(row.keys, 0.0);
    delta = 0;
    if (g.d_lse.data)
      delta = -read_real(g.d_lse.data, g.d_lse.dtype,
                         row_offset(g.d_lse, p.q_begin, row.b, row.h, row.i));
    const int64_t mass = key_array_offset(p, p.heads, row.b, row.h);
    for (int64_t j = 0; j < row.keys; ++j) {
      if (!row.visible[j]) continue;
      ds[j] = row.keep[j] * dot(d_out.data(), &source.v[j * p.value_dim], p.value_dim);
      if (g.d_key_mass) ds[j] += read_real(g.d_key_mass, row.small, mass + j);
      delta += row.p[j] * ds[j];
    }
    for (int64_t j = 0; j < row.keys; ++j)
      if (row.visible[j]) ds[j] = row.lse == -kInfinity ? 0.0 : row.p[j] * (ds[j] - delta);
  }
};

// dbias by its own rows, each a sum over the batches and heads that share it.
void bias_gradient(const Problem& p, const Gradients& g, const std::vector<Keys>& keys) {
  const int64_t batches = g.dbias.stride[0] ? p.batch : 1;
  const int64_t heads = g.dbias.stride[1] ? p.heads : 1;
  const int64_t* stride = g.dbias.stride;
  for_each_task(p, batches * heads * p.max_q, [&](int64_t task) {
    const int64_t i = task % p.max_q, first_h = task / p.max_q % heads;
    const int64_t first_b = task / p.max_q / heads;
    Row row(p);
    RowGradient gradient;
    Doubles sum(p.max_k, 0.0);
    for (int64_t b = first_b; b < p.batch; b += batches)
      for (int64_t h = first_h; h < p.heads; h += heads) {
        const Keys& source = keys[b * p.kv_heads + h / p.group()];
        row.solve(source, b, h, i);
        gradient.solve(row, source, g);
        for (int64_t j = 0; j < row.keys; ++j) sum[j] += gradient.ds[j];
      }
    const int64_t at = first_b * stride[0] + first_h * stride[1] + i * stride[2];
    if (stride[3] == 0) {
      double total = 0;
      for (double x : sum) total += x;
      write_real(g.dbias.data, g.dbias.dtype, at, total);
    } else {
      for (int64_t j = 0; j < p.max_k; ++j)
        write_real(g.dbias.data, g.dbias.dtype, at + j * stride[3], sum[j]);
    }
  });
}

}  // namespace

Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

void reference_forward(const Problem& p, const Outputs& outputs) {
  const std::vector<Keys> keys = read_keys(p);
  for_each_task(p, p.batch * p.heads, [&](int64_t task) {
    const int64_t b = task / p.heads, h = task % p.heads, n = p.k_len(b);
    const Keys& source = keys[b * p.kv_heads + h / p.group()];
    Row row(p);
    Doubles out(p.value_dim), mass(p.k_begin.empty() ? p.max_k : n, 0.0);
    for (int64_t i = 0; i < p.q_len(b); ++i) {
      row.solve(source, b, h, i);
      std::fill(out.begin(), out.end(), 0.0);
      for (int64_t j = 0; j < n; ++j) {
        if (!row.visible[j]) continue;
        mass[j] += row.p[j];
        if (row.lse != -kInfinity)
          add(out.data(), row.p[j] * row.keep[j], &source.v[j * p.value_dim], p.value_dim);
      }
      write_row(outputs.out, row_offset(outputs.out, p.q_begin, b, h, i), p.value_dim, out.data());
      if (outputs.lse.data)
        write_real(outputs.lse.data, outputs.lse.dtype, row_offset(outputs.lse, p.q_begin, b, h, i),
                   row.lse);
    }
    if (outputs.key_mass)
      for (size_t j = 0; j < mass.size(); ++j)
        write_real(outputs.key_mass, row.small, key_array_offset(p, p.heads, b, h) + j, mass[j]);
  });
}

void reference_backward(const Problem& p, const Gradients& g) {
  const std::vector<Keys> keys = read_keys(p);
  const bool by_head = p.key_bias_heads == p.heads;
  Doubles dsink(p.batch * p.heads, 0.0);
  DType small = p.q.dtype == DType::f64 ? DType::f64 : DType::f32;
  for_each_task(p, p.batch * p.kv_heads, [&](int64_t task) {
    const int64_t b = task / p.kv_heads, kv_head = task % p.kv_heads, n = p.k_len(b);
    const Keys& source = keys[task];
    Row row(p);
    RowGradient gradient;
    Doubles dq(p.dim), dk(n * p.dim, 0.0), dv(n * p.value_dim, 0.0), dkey_bias(n, 0.0);
    for (int64_t h = kv_head * p.group(); h < (kv_head + 1) * p.group(); ++h) {
      for (int64_t i = 0; i < p.q_len(b); ++i) {
        row.solve(source, b, h, i);
        gradient.solve(row, source, g);
        std::fill(dq.begin(), dq.end(), 0.0);
        for (int64_t j = 0; j < n; ++j) {
          if (!row.visible[j] || row.lse == -kInfinity) continue;
          const double dx = p.scale * gradient.ds[j] * row.slope[j];
          add(dq.data(), dx, &source.k[j * p.dim], p.dim);
          add(&dk[j * p.dim], dx, row.q.data(), p.dim);
          add(&dv[j * p.value_dim], row.p[j] * row.keep[j], gradient.d_out.data(), p.value_dim);
          dkey_bias[j] += gradient.ds[j];
        }
        if (p.sink && row.lse != -kInfinity)
          dsink[b * p.heads + h] -= std::exp(row.sink - row.lse) * gradient.delta;
        if (g.dq.data) write_row(g.dq, row_offset(g.dq, p.q_begin, b, h, i), p.dim, dq.data());
      }
      const bool last = by_head || h + 1 == (kv_head + 1) * p.group();
      if (g.dkey_bias && last) {
        const int64_t at = key_array_offset(p, p.key_bias_heads, b, by_head ? h : kv_head);
        for (int64_t j = 0; j < n; ++j) write_real(g.dkey_bias, small, at + j, dkey_bias[j]);
        std::fill(dkey_bias.begin(), dkey_bias.end(), 0.0);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      if (g.dk.data)
        write_row(g.dk, row_offset(g.dk, p.k_begin, b, kv_head, j), p.dim, &dk[j * p.dim]);
      if (g.dv.data)
        write_row(g.dv, row_offset(g.dv, p.k_begin, b, kv_head, j), p.value_dim,
                  &dv[j * p.value_dim]);
    }
  });
  if (g.dsink)
    for (int64_t h = 0; h < p.heads; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < p.batch; ++b) sum += dsink[b * p.heads + h];
      write_real(g.dsink, small, h, sum);
    }
  if (g.dbias.data) bias_gradient(p, g, keys);
}

}  // namespace pentad::attention
