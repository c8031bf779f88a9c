// SPDX-License-Identifier: Apache-2.0
// Results of attention against the definition's, for random problems and a random loss.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_case.h"
#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace pentad::attention::test {

// Errors relative to the largest magnitude that enters a sum; `statistics` is of lse and key_mass,
// which are float32 (or float64) whatever the dtype.
struct Tolerance {
  double out, statistics, gradient;
};

inline Tolerance tolerance(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return {0, 0, 0};  // the reference's own path
    // Scores up to 30 are rounded at 2^-20, which exp turns into a relative error of p.
    case DType::f32: return {2e-5, 2e-5, 5e-5};
    // Results have 11 bits; everything before is float32.
    case DType::f16: return {0x1p-10, 2e-5, 0x1p-9};
    // Results have 8 bits, and so have p and its gradient before the second products; exponentials
    // that only become such p have 13.
    default: return {0x1p-7, 2e-4, 0x1p-6};
  }
}

inline const char* dtype_text(DType dtype) {
  return dtype == DType::f64   ? "f64"
         : dtype == DType::f32 ? "f32"
         : dtype == DType::f16 ? "f16"
                               : "bf16";
}

inline double largest(const Array& x) {
  double most = 0;
  for (int64_t i = 0; i < x.size(); ++i)
    if (std::isfinite(x.value(i))) most = std::max(most, std::abs(x.value(i)));
  return most;
}

inline double worst = 0;  // the largest error as a share of what is allowed

// All of the memory, so that what lies between the elements is seen to be untouched.
inline void compare(const char* what, const Case& c, const Array& got, const Array& expected,
                    double allowed) {
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double a = got.value(i), b = expected.value(i);
    const bool same = a == b || (std::isnan(a) && std::isnan(b));
    const bool close = same || std::abs(a - b) <= allowed;
    if (!same && close) worst = std::max(worst, std::abs(a - b) / allowed);
    CHECK(close, what, name(isa()), dtype_text(c.p.q.dtype), c.options, "at", i, a, b, allowed);
    if (!close) return;
  }
}

using Arrays = std::vector<Array>;

inline Outputs outputs_of(Arrays& arrays) {
  return {arrays[0].operand, arrays[1].operand,
          arrays.size() > 2 ? arrays[2].operand.data : nullptr};
}

// Keys that no query sees hold NaN: nothing may come of them.
inline void poison_unseen(Case& c) {
  const Problem& p = c.p;
  if (c.packed() || c.k.operand.stride[0] == 0) return;
  const auto spoil = [](Array& x, int64_t b, int64_t s) {
    for (int64_t h = 0; h < x.shape[1]; ++h)
      for (int64_t d = 0; d < x.shape[3]; ++d) encode(x.at(b, h, s, d), x.operand.dtype, NAN);
  };
  if (!c.cached) {
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t j = 0; j < p.max_k; ++j) {
        bool seen = false;
        for (int64_t i = 0; i < p.max_q; ++i)
          seen = seen || (j >= p.offset(b) + i - p.left && j <= p.offset(b) + i + p.right);
        if (!seen) spoil(c.k, b, j), spoil(c.v, b, j);
      }
    return;
  }
  std::vector<bool> used(c.k.shape[0] * c.k.shape[2]);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t j = 0; j < p.k_length[b]; ++j) {
      int64_t row = p.cache_row.empty() ? b : p.cache_row[b];
      int64_t at = j + (p.left_pad.empty() ? 0 : p.left_pad[b]);
      if (p.page_size) {
        row = p.block_table[b * p.pages_per_sequence + j / p.page_size];
        at = j % p.page_size;
      }
      used[row * c.k.shape[2] + at] = true;
    }
  for (int64_t n = 0; n < static_cast<int64_t>(used.size()); ++n)
    if (!used[n]) {
      spoil(c.k, n / c.k.shape[2], n % c.k.shape[2]);
      spoil(c.v, n / c.k.shape[2], n % c.k.shape[2]);
    }
}

// One key or value of NaN: nothing may come of it where it is not seen.
inline void poison_one(Case& c) {
  Array& x = chance(0.5) ? c.k : c.v;
  if (x.size() == 0 || c.p.dropout > 0) return;  // NaN * 0, or dropped?
  c.options += &x == &c.k ? " NaN key" : " NaN value";
  const int64_t b = pick(0, x.shape[0] - 1), h = pick(0, x.shape[1] - 1);
  const int64_t s = pick(0, x.shape[2] - 1), d = pick(0, x.shape[3] - 1);
  encode(x.at(b, h, s, d), x.operand.dtype, NAN);
}

// A case with a random loss: what the definition gives, and where results go.
struct Check {
  Case& c;
  const Tolerance allowed;
  Arrays blank, expected;  // out, lse and perhaps key_mass
  Arrays gradient_blank, expected_gradients;
  Array d_out, d_lse, d_mass;
  Gradients given;
  bool with_bias;
  size_t after_bias;

  explicit Check(Case& c) : c(c), allowed(tolerance(c.p.q.dtype)) {
    const Problem& p = c.p;
    if (chance(0.4)) poison_unseen(c);
    else if (chance(0.2)) poison_one(c);
    const auto layout = [] { return static_cast<int>(pick(0, Array::layouts - 1)); };
    blank = {c.rows(false, p.value_dim, layout()), c.row_statistics()};
    if (!c.cached && chance(0.4)) blank.push_back(c.key_statistics(p.heads));
    expected = blank;
    set_num_threads(2);
    reference_forward(p, outputs_of(expected));

    d_out = c.rows(false, p.value_dim, layout());
    d_lse = c.row_statistics(), d_mass = c.key_statistics(p.heads);
    d_out.fill_normal(), d_lse.fill_normal(), d_mass.fill_normal();
    given.out = expected[0].operand, given.lse = expected[1].operand;
    given.d_out = d_out.operand;
    if (chance(0.4)) given.d_lse = d_lse.operand;
    if (chance(0.4)) given.d_key_mass = d_mass.operand.data;
    with_bias = c.bias_per_query && p.bias.data && chance(0.8);
    gradient_blank = {c.rows(false, p.dim, layout()), c.rows(true, p.dim, layout()),
                      c.rows(true, p.value_dim, layout())};
    if (with_bias)
      gradient_blank.emplace_back(c.small(), c.bias.shape[0], c.bias.shape[1], c.bias.shape[2],
                                  c.bias.shape[3]);
    after_bias = gradient_blank.size();
    if (p.key_bias) gradient_blank.push_back(c.key_statistics(p.key_bias_heads));
    if (p.sink) gradient_blank.emplace_back(c.small(), 1, p.heads, 1, 1);
    expected_gradients = gradient_blank;
    if (!c.cached) reference_backward(p, gradients_of(expected_gradients));
  }
  Check(const Check&) = delete;

  Gradients gradients_of(Arrays& arrays) const {
    Gradients g = given;
    g.dq = arrays[0].operand, g.dk = arrays[1].operand, g.dv = arrays[2].operand;
    if (with_bias) {
      g.dbias = arrays[3].operand;
      for (int i = 0; i < 4; ++i)
        if (arrays[3].shape[i] == 1) g.dbias.stride[i] = 0;
    }
    if (c.p.key_bias) g.dkey_bias = arrays[after_bias].operand.data;
    if (c.p.sink) g.dsink = arrays.back().operand.data;
    return g;
  }

  void results(const Arrays& got) const {
    const double keep = 1 / (1 - c.p.dropout);
    compare("out", c, got[0], expected[0], allowed.out * std::max(largest(expected[0]), keep));
    compare("lse", c, got[1], expected[1],
            allowed.statistics * std::max(largest(expected[1]), 1.0));
    if (got.size() > 2)
      compare("key_mass", c, got[2], expected[2],
              allowed.statistics * std::max(largest(expected[2]), 1.0));
  }

  void gradients(const Arrays& got) const {
    // What a gradient of one score is made of: <do, v>, dlse and dmass, all of deviation 1.
    const double keep = 1 / (1 - c.p.dropout);
    const double score_gradient = 4 * keep * std::sqrt(static_cast<double>(c.p.value_dim)) + 8;
    const char* const names[] = {"dq", "dk", "dv"};
    for (int n = 0; n < 3; ++n) {
      const double natural = n == 2 ? 4 * keep : std::abs(c.p.scale) * 4 * score_gradient;
      compare(names[n], c, got[n], expected_gradients[n],
              allowed.gradient * (largest(expected_gradients[n]) + natural));
    }
    for (size_t n = 3; n < got.size(); ++n)
      compare(n < after_bias ? "dbias" : "dkey_bias or dsink", c, got[n], expected_gradients[n],
              allowed.gradient * (largest(expected_gradients[n]) + score_gradient));
  }
};

}  // namespace pentad::attention::test
