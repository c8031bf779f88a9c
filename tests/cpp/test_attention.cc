// SPDX-License-Identifier: Apache-2.0
// forward and backward at every level against the definition, on random problems; and what the
// definition itself must give in cases known by hand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "attention_case.h"
#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"

using namespace pentad;
using namespace pentad::attention;
using namespace pentad::attention::test;

namespace {

// Errors relative to the largest magnitude that enters a sum; `statistics` is of lse and key_mass,
// which are float32 (or float64) whatever the dtype.
struct Tolerance {
  double out, statistics, gradient;
};

Tolerance tolerance(DType dtype) {
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

const char* dtype_text(DType dtype) {
  return dtype == DType::f64   ? "f64"
         : dtype == DType::f32 ? "f32"
         : dtype == DType::f16 ? "f16"
                               : "bf16";
}

double largest(const Array& x) {
  double most = 0;
  for (int64_t i = 0; i < x.size(); ++i)
    if (std::isfinite(x.value(i))) most = std::max(most, std::abs(x.value(i)));
  return most;
}

double worst = 0;  // the largest error as a share of what is allowed

// All of the memory, so that what lies between the elements is seen to be untouched.
void compare(const char* what, const Case& c, const Array& got, const Array& expected,
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

Outputs outputs_of(Arrays& arrays) {
  return {arrays[0].operand, arrays[1].operand,
          arrays.size() > 2 ? arrays[2].operand.data : nullptr};
}

// f writes into copies of `blank`: the same at 1, 2 and 3 threads, to the bit.
template <class F>
Arrays run_at_threads(const Case& c, const Arrays& blank, F f) {
  Arrays first;
  for (int threads : {1, 2, 3}) {
    set_num_threads(threads);
    Arrays arrays = blank;
    f(arrays);
    if (threads == 1) first = arrays;
    for (size_t n = 0; n < arrays.size(); ++n)
      CHECK(arrays[n].memory == first[n].memory, "threads", threads, "result", n, name(isa()),
            dtype_text(c.p.q.dtype), c.options);
  }
  return first;
}

// Keys that no query sees hold NaN: nothing may come of them.
void poison_unseen(Case& c) {
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
void poison_one(Case& c) {
  Array& x = chance(0.5) ? c.k : c.v;
  if (x.size() == 0 || c.p.dropout > 0) return;  // NaN * 0, or dropped?
  c.options += &x == &c.k ? " NaN key" : " NaN value";
  const int64_t b = pick(0, x.shape[0] - 1), h = pick(0, x.shape[1] - 1);
  const int64_t s = pick(0, x.shape[2] - 1), d = pick(0, x.shape[3] - 1);
  encode(x.at(b, h, s, d), x.operand.dtype, NAN);
}

void check_case(Case& c) {
  const Problem& p = c.p;
  const Tolerance allowed = tolerance(p.q.dtype);
  if (chance(0.4)) poison_unseen(c);
  else if (chance(0.2)) poison_one(c);
  Arrays blank = {c.rows(false, p.value_dim, static_cast<int>(pick(0, Array::layouts - 1))),
                  c.row_statistics()};
  if (!c.cached && chance(0.4)) blank.push_back(c.key_statistics(p.heads));
  Arrays expected = blank;
  set_num_threads(2);
  reference_forward(p, outputs_of(expected));

  // Gradients of a random loss.
  Array d_out = c.rows(false, p.value_dim, static_cast<int>(pick(0, Array::layouts - 1)));
  Array d_lse = c.row_statistics(), d_mass = c.key_statistics(p.heads);
  d_out.fill_normal(), d_lse.fill_normal(), d_mass.fill_normal();
  Gradients given;
  given.out = expected[0].operand, given.lse = expected[1].operand;
  given.d_out = d_out.operand;
  if (chance(0.4)) given.d_lse = d_lse.operand;
  if (chance(0.4)) given.d_key_mass = d_mass.operand.data;
  const auto layout = [] { return static_cast<int>(pick(0, Array::layouts - 1)); };
  const bool with_bias = c.bias_per_query && p.bias.data && chance(0.8);
  Arrays gradient_blank = {c.rows(false, p.dim, layout()), c.rows(true, p.dim, layout()),
                           c.rows(true, p.value_dim, layout())};
  if (with_bias)
    gradient_blank.emplace_back(c.small(), c.bias.shape[0], c.bias.shape[1], c.bias.shape[2],
                                c.bias.shape[3]);
  const size_t after_bias = gradient_blank.size();
  if (p.key_bias) gradient_blank.push_back(c.key_statistics(p.key_bias_heads));
  if (p.sink) gradient_blank.emplace_back(c.small(), 1, p.heads, 1, 1);
  const auto gradients_of = [&](Arrays& arrays) {
    Gradients g = given;
    g.dq = arrays[0].operand, g.dk = arrays[1].operand, g.dv = arrays[2].operand;
    if (with_bias) {
      g.dbias = arrays[3].operand;
      for (int i = 0; i < 4; ++i)
        if (arrays[3].shape[i] == 1) g.dbias.stride[i] = 0;
    }
    if (p.key_bias) g.dkey_bias = arrays[after_bias].operand.data;
    if (p.sink) g.dsink = arrays.back().operand.data;
    return g;
  };
  Arrays expected_gradients = gradient_blank;
  if (!c.cached) reference_backward(p, gradients_of(expected_gradients));

  // What a gradient of one score is made of: <do, v>, dlse and dmass, all of deviation 1.
  const double keep = 1 / (1 - p.dropout);
  const double score_gradient = 4 * keep * std::sqrt(static_cast<double>(p.value_dim)) + 8;
  for (Isa level : isa_available()) {
    set_isa(level);
    const Arrays got =
        run_at_threads(c, blank, [&](Arrays& arrays) { forward(p, outputs_of(arrays)); });
    compare("out", c, got[0], expected[0], allowed.out * std::max(largest(expected[0]), keep));
    compare("lse", c, got[1], expected[1],
            allowed.statistics * std::max(largest(expected[1]), 1.0));
    if (got.size() > 2)
      compare("key_mass", c, got[2], expected[2],
              allowed.statistics * std::max(largest(expected[2]), 1.0));
    if (c.cached) continue;
    const Arrays gradients = run_at_threads(
        c, gradient_blank, [&](Arrays& arrays) { backward(p, gradients_of(arrays)); });
    const char* const names[] = {"dq", "dk", "dv"};
    for (int n = 0; n < 3; ++n) {
      const double natural = n == 2 ? 4 * keep : std::abs(p.scale) * 4 * score_gradient;
      compare(names[n], c, gradients[n], expected_gradients[n],
              allowed.gradient * (largest(expected_gradients[n]) + natural));
    }
    for (size_t n = 3; n < gradients.size(); ++n)
      compare(n < after_bias ? "dbias" : "dkey_bias or dsink", c, gradients[n],
              expected_gradients[n],
              allowed.gradient * (largest(expected_gradients[n]) + score_gradient));
  }
}

// The published vectors of Random123.
void check_philox() {
  const auto equal = [](const Philox& x, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return x.word[0] == a && x.word[1] == b && x.word[2] == c && x.word[3] == d;
  };
  CHECK(equal(philox(0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  const uint32_t ones = 0xffffffff;
  CHECK(equal(philox(~uint64_t{0}, ones, ones, ones, ones), 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
              0x6d5451fd));
  CHECK(equal(philox(0x299f31d0a4093822, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344),
              0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

// One key has probability 1, so the output is its value, for every number of 16 bits; with two
// keys and q = 0 it is their mean, rounded once.
void check_known_outputs() {
  for (DType dtype : {DType::bf16, DType::f16}) {
    Case c;
    Problem& p = c.p;
    p.batch = 256, p.heads = p.kv_heads = 1, p.dim = 3, p.value_dim = 256;
    p.max_q = p.max_k = 1;
    p.q.dtype = dtype;
    c.q = c.rows(false, 3, 0), c.k = c.rows(true, 3, 0), c.v = c.rows(true, 256, 0);
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const uint16_t pattern = static_cast<uint16_t>(bits);
      std::memcpy(&c.v.memory[2 * bits], &pattern, 2);
    }
    p.q = c.q.operand, p.k = c.k.operand, p.v = c.v.operand;
    Array out = c.rows(false, 256, 0);
    for (bool reference : {true, false}) {
      Outputs outputs{out.operand, {}, nullptr};
      reference ? reference_forward(p, outputs) : forward(p, outputs);
      compare("every value", c, out, c.v, 0);
    }
  }
  const double pairs[][4] = {// first, second, mean in bf16 and in f16
                             {1, 1 + 0x1p-7, 1, 1 + 0x1p-8},
                             {1 + 0x1p-7, 1 + 0x1p-6, 1 + 0x1p-6, 1 + 0x1p-7 + 0x1p-8},
                             {-1, -1 - 0x1p-6, -1 - 0x1p-7, -1 - 0x1p-7},
                             {0x1p-14, -0x1p-14, 0, 0}};
  for (const auto& row : pairs)
    for (DType dtype : {DType::bf16, DType::f16}) {
      Case c;
      Problem& p = c.p;
      p.batch = p.heads = p.kv_heads = p.dim = p.value_dim = p.max_q = 1, p.max_k = 2;
      p.q.dtype = dtype;
      c.q = c.rows(false, 1, 0), c.k = c.rows(true, 1, 0), c.v = c.rows(true, 1, 0);
      encode(c.q.at(0, 0, 0, 0), dtype, 0);
      encode(c.v.at(0, 0, 0, 0), dtype, row[0]);
      encode(c.v.at(0, 0, 1, 0), dtype, row[1]);
      p.q = c.q.operand, p.k = c.k.operand, p.v = c.v.operand;
      Array out = c.rows(false, 1, 0), lse = c.row_statistics();
      for (bool reference : {true, false}) {
        Outputs outputs{out.operand, lse.operand, nullptr};
        reference ? reference_forward(p, outputs) : forward(p, outputs);
        CHECK(out.value(0) == row[dtype == DType::bf16 ? 2 : 3], dtype_text(dtype), out.value(0));
        CHECK(std::abs(lse.value(0) - std::log(2.0)) < (dtype == DType::bf16 ? 2e-4 : 2e-6),
              lse.value(0));
      }
    }
}

void check_append() {
  for (int round = 0; round < 40; ++round) {
    const DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
    auto c = random_case(dtypes[round % 4], 60, 40, true);
    Problem& p = c->p;
    if (!p.cache_row.empty())
      for (int64_t b = 0; b < p.batch; ++b) p.cache_row[b] = p.batch + 1 - b;
    // As many tokens as every sequence has room for.
    const int64_t capacity = p.page_size ? p.page_size * p.pages_per_sequence : c->k.shape[2];
    int64_t tokens = 100;
    for (int64_t b = 0; b < p.batch; ++b)
      tokens =
          std::min(tokens, capacity - p.k_length[b] - (p.left_pad.empty() ? 0 : p.left_pad[b]));
    Array k_new(dtypes[round % 4], p.batch, p.kv_heads, tokens, p.dim, round % Array::layouts);
    Array v_new(dtypes[round % 4], p.batch, p.kv_heads, tokens, p.value_dim);
    k_new.fill_normal(), v_new.fill_normal();
    Array k = c->k, v = c->v;
    const auto copy = [&](Array& from, Array& to) {
      from.each([&](int64_t b, int64_t h, int64_t t, int64_t d) {
        int64_t row = p.cache_row.empty() ? b : p.cache_row[b], at = p.k_length[b] + t;
        if (p.page_size) {
          row = p.block_table[b * p.pages_per_sequence + at / p.page_size];
          at %= p.page_size;
        } else if (!p.left_pad.empty()) {
          at += p.left_pad[b];
        }
        std::memcpy(to.at(row, h, at, d), from.at(b, h, t, d), bytes_of(to.operand.dtype));
      });
    };
    copy(k_new, k), copy(v_new, v);
    append(p, p.k_length, k_new.operand, v_new.operand, tokens);
    CHECK(k.memory == c->k.memory && v.memory == c->v.memory, c->options, tokens);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 25;
  check_philox();
  check_append();
  for (Isa level : isa_available()) {
    set_isa(level);
    check_known_outputs();
  }
  for (int round = 0; round < rounds; ++round)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      if (dtype == DType::f64 && round % 8) continue;
      const int64_t rows = round % 5 == 4 ? 200
                           : round % 2    ? 140
                                          : 70,
                    dim = round % 5 == 3 ? 200 : 70;
      check_case(*random_case(dtype, rows, dim, false));
      check_case(*random_case(dtype, 2 * rows, dim, true));
    }
  std::printf("largest error: %.2f of what is allowed\n", worst);
  return report();
}
