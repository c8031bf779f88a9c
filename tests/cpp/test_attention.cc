// SPDX-License-Identifier: Apache-2.0
// forward and backward at every level against the definition, on random problems; and what the
// definition itself must give in cases known by hand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "attention_check.h"
#include "common/isa.h"
#include "common/parallel.h"

using namespace pentad;
using namespace pentad::attention;
using namespace pentad::attention::test;

namespace {

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

void check_case(Case& c) {
  const Check made(c);
  for (Isa level : isa_available()) {
    set_isa(level);
    made.results(
        run_at_threads(c, made.blank, [&](Arrays& arrays) { forward(c.p, outputs_of(arrays)); }));
    if (c.cached) continue;
    made.gradients(run_at_threads(
        c, made.gradient_blank, [&](Arrays& arrays) { backward(c.p, made.gradients_of(arrays)); }));
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
