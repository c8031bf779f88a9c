// SPDX-License-Identifier: Apache-2.0
// Hopper's forward attention, executed on the CPU lane by lane, against the definition.
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

// A (B, H, S, D) array, its dimensions in any order in memory.
struct Array {
  std::vector<uint16_t> memory;
  Operand operand;

  Array(bool bf16, int64_t b, int64_t h, int64_t s, int64_t d, bool heads_inside, bool filled) {
    memory.resize(b * h * s * d + 8);
    memory.resize(b * h * s * d);
    if (filled) {
      std::normal_distribution<double> normal;
      for (uint16_t& bits : memory)
        bits = bf16 ? real_to_16_bits(normal(random_bits), 7, -126)
                    : real_to_16_bits(normal(random_bits), 10, -14);
    }
    operand = {memory.data(), bf16 ? DType::bf16 : DType::f16, {h * s * d, s * d, d, 1}};
    if (heads_inside) operand = {memory.data(), operand.dtype, {h * s * d, d, h * d, 1}};
  }
  double at(bool bf16, int64_t b, int64_t h, int64_t s, int64_t d) const {
    const auto& t = operand.stride;
    const uint16_t bits = memory[b * t[0] + h * t[1] + s * t[2] + d * t[3]];
    return bf16 ? real_from_bf16(bits) : real_from_half(bits);
  }
};

void compare(bool bf16, int64_t batch, int64_t heads, int64_t kv_heads, int64_t sq, int64_t sk,
             int64_t dim, int64_t left, int64_t right, bool top_left, bool heads_inside) {
  Array q(bf16, batch, heads, sq, dim, heads_inside, true);
  Array k(bf16, batch, kv_heads, sk, dim, heads_inside, true);
  Array v(bf16, batch, kv_heads, sk, dim, heads_inside, true);
  Array out(bf16, batch, heads, sq, dim, heads_inside, false), want = out;
  want.operand.data = want.memory.data();
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
  // A weight and an output are rounded to 8 or 11 bits; a logarithm to those of a float.
  const double tolerance = bf16 ? 1e-2 : 1.5e-3;
  for (int64_t i = 0; i < batch * heads * sq; ++i)
    CHECK(lse[i] == want_lse[i] || std::abs(lse[i] - want_lse[i]) < 1e-5, i, lse[i], want_lse[i]);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < sq; ++i)
        for (int64_t d = 0; d < dim; ++d) {
          const double got = out.at(bf16, b, h, i, d), expected = want.at(bf16, b, h, i, d);
          CHECK(std::abs(got - expected) <= tolerance, bf16, sq, sk, dim, left, right, b, h, i, d,
                got, expected);
        }
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
