// SPDX-License-Identifier: Apache-2.0
// Hopper's attention, executed on the CPU lane by lane, against the definition.
#include <cmath>
#include <random>
#include <vector>

#include "attention/attention_hopper.h"
#include "check.h"
#include "common/reals.h"
#include "orders.h"

using namespace pentad;
using namespace pentad::attention;

namespace {

std::mt19937 random_bits(5);

using cuda_scratch = int64_t;  // aligned as scratch memory is

// A (B, H, S, D) array, its dimensions in any order in memory.
struct Array {
  bool bf16;
  int64_t size[4];
  std::vector<uint16_t> memory;
  Operand operand;

  Array(bool bf16, int64_t b, int64_t h, int64_t s, int64_t d, bool heads_inside, bool filled)
      : bf16(bf16), size{b, h, s, d}, memory(b * h * s * d) {
    std::normal_distribution<double> normal;
    for (uint16_t& bits : memory) bits = filled ? bits_of(normal(random_bits)) : bits_of(77);
    operand = {memory.data(), bf16 ? DType::bf16 : DType::f16, {h * s * d, s * d, d, 1}};
    if (heads_inside) operand = {memory.data(), operand.dtype, {h * s * d, d, h * d, 1}};
  }
  Array(const Array&) = delete;
  uint16_t bits_of(double x) const {
    return bf16 ? real_to_16_bits(x, 7, -126) : real_to_16_bits(x, 10, -14);
  }
  double at(int64_t b, int64_t h, int64_t s, int64_t d) const {
    const auto& t = operand.stride;
    const uint16_t bits = memory[b * t[0] + h * t[1] + s * t[2] + d * t[3]];
    return bf16 ? real_from_bf16(bits) : real_from_half(bits);
  }
};

// Of the same layout, holding something else.
Array empty_like(const Array& x) {
  const auto& s = x.size;
  return {x.bf16, s[0], s[1], s[2], s[3], x.operand.stride[1] == s[3] && s[1] > 1, false};
}

void same(const char* what, const Array& got, const Array& want, double tolerance) {
  for (int64_t b = 0; b < got.size[0]; ++b)
    for (int64_t h = 0; h < got.size[1]; ++h)
      for (int64_t i = 0; i < got.size[2]; ++i)
        for (int64_t d = 0; d < got.size[3]; ++d) {
          const double x = got.at(b, h, i, d), y = want.at(b, h, i, d);
          CHECK(std::abs(x - y) <= tolerance * std::max(1.0, std::abs(y)), what, got.bf16, b, h, i,
                d, x, y);
        }
}

void compare(bool bf16, int64_t batch, int64_t heads, int64_t kv_heads, int64_t sq, int64_t sk,
             int64_t dim, int64_t left, int64_t right, bool top_left, bool heads_inside) {
  Array q(bf16, batch, heads, sq, dim, heads_inside, true);
  Array k(bf16, batch, kv_heads, sk, dim, heads_inside, true);
  Array v(bf16, batch, kv_heads, sk, dim, heads_inside, true);
  Array out(bf16, batch, heads, sq, dim, heads_inside, false), want = empty_like(out);
  std::vector<float> lse(batch * heads * sq), want_lse = lse;
  Problem p;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.dim = p.value_dim = dim;
  p.max_q = sq;
  p.max_k = sk;
  p.q = q.operand;
  p.k = k.operand;
  p.v = v.operand;
  p.scale = 1 / std::sqrt(static_cast<double>(dim));
  p.left = left;
  p.right = right;
  p.top_left = top_left;
  const Operand rows{lse.data(), DType::f32, {heads * sq, sq, 1, 0}};
  const Outputs to{out.operand, rows, nullptr};
  Outputs definition{want.operand, rows, nullptr};
  definition.lse.data = want_lse.data();
  CHECK(cuda::hopper_takes(p, to));
  cuda::hopper_forward({}, p, to);
  reference_forward(p, definition);
  for (int64_t i = 0; i < batch * heads * sq; ++i)
    CHECK(lse[i] == want_lse[i] || std::abs(lse[i] - want_lse[i]) < 1e-5, i, lse[i], want_lse[i]);
  // A weight and an output are rounded to 8 or 11 bits.
  const double tolerance = bf16 ? 1e-2 : 1.5e-3;
  same("out", out, want, tolerance);

  Array d_out(bf16, batch, heads, sq, dim, heads_inside, true);
  std::vector<float> d_lse(batch * heads * sq);
  for (float& x : d_lse) x = std::normal_distribution<float>()(random_bits);
  Gradients g;
  g.out = want.operand;
  g.lse = definition.lse;
  g.d_out = d_out.operand;
  g.d_lse = rows;
  g.d_lse.data = d_lse.data();
  Array dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  g.dq = dq.operand;
  g.dk = dk.operand;
  g.dv = dv.operand;
  Gradients by_definition = g;
  Array want_dq = empty_like(q), want_dk = empty_like(k), want_dv = empty_like(v);
  by_definition.dq = want_dq.operand;
  by_definition.dk = want_dk.operand;
  by_definition.dv = want_dv.operand;
  CHECK(cuda::hopper_takes(p, g));
  std::vector<cuda_scratch> scratch((cuda::hopper_backward_scratch(p) + 7) / 8);
  cuda::hopper_backward({}, p, g, scratch.data());
  reference_backward(p, by_definition);
  // Sums over up to hundreds of pairs, whose weights and gradients are rounded.
  same("dq", dq, want_dq, 4 * tolerance);
  same("dk", dk, want_dk, 4 * tolerance * static_cast<double>(heads / kv_heads));
  same("dv", dv, want_dv, 4 * tolerance * static_cast<double>(heads / kv_heads));
}

}  // namespace

int main() {
  in_every_order([] {
    compare(true, 1, 2, 1, 130, 300, 64, kUnbounded, 0, false, true);
    compare(false, 1, 1, 1, 40, 129, 128, kUnbounded, kUnbounded, false, false);
  });
  compare(true, 1, 1, 1, 257, 600, 128, 100, 0, false, false);
  compare(false, 2, 1, 1, 200, 70, 64, kUnbounded, 0, false, false);  // rows without keys
  compare(true, 1, 1, 1, 70, 200, 64, 5, 3, true, true);
  return report();
}
