// SPDX-License-Identifier: Apache-2.0
// The definitions of matrix_scan.h against differences, explicit matrices, each other and numbers
// known by hand.
#include <cmath>
#include <cstdlib>

#include "check.h"
#include "matrix_case.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;

namespace {

void check_differences() {
  MatrixCase c(DType::f64, true);
  check_slopes(
      c, c.results(),
      [&](const Arrays& to) { reference_matrix_scan_forward(c.p, to["out"], to["last"]); },
      [&](const Arrays& given, const Arrays& to) {
        reference_matrix_scan_backward(c.p, MatrixCase::gradients_of(given, nullptr, to));
      });
}

// Token by token on a cache is the whole at once.
void check_steps() {
  MatrixCase c(DType::f64, true);
  const MatrixScan& whole = c.p;
  if (!whole.begin.empty() || whole.reverse) return;
  const Arrays expected = c.results();
  reference_matrix_scan_forward(whole, expected["out"], expected["last"]);
  Array state(DType::f64, c.like_state()), out(DType::f64, c.like_v());
  for (int64_t n = 0; n < state.count(); ++n)
    state.set(n, whole.initial.data ? c.in.find("initial")->get(n) : 0);
  for (int64_t t = 0; t < whole.length; ++t) {
    const auto step = [&](const Operand& x) {
      Operand at = x;
      if (x.data) at.data = static_cast<double*>(x.data) + t * x.stride[1];
      std::copy(x.stride + 2, x.stride + 5, at.stride + 1);
      return at;
    };
    MatrixUpdate p;
    p.batch = whole.batch, p.heads = whole.heads, p.groups = whole.groups;
    p.keys = whole.keys, p.values = whole.values, p.scale = whole.scale;
    p.delta = whole.delta, p.key_decay = whole.key_decay;
    p.q = step(whole.q), p.k = step(whole.k), p.v = step(whole.v), p.a = step(whole.a);
    p.w = step(whole.w), p.d = whole.d, p.state = state.operand, p.out = step(out.operand);
    reference_matrix_update(p);
  }
  for (int64_t n = 0; n < out.count(); ++n)
    CHECK(out.get(n) == expected.find("out")->get(n), n, c.text);
  for (int64_t n = 0; n < state.count(); ++n)
    CHECK(state.get(n) == expected.find("last")->get(n), n, c.text);
}

// o_t = scale sum_{s <= t} (q_t^T T_t ... T_{s+1} k_s) w_s v_s + d v_t, and the initial state behind
// T_t ... T_1, with T_t = (I - w_t k_t k_t^T) diag(a_t), or diag(a_t): the transposed transitions on
// the query, one after the other.
void check_matrices() {
  const MatrixCase c(DType::f64, true);
  const MatrixScan& p = c.p;
  const Arrays got = c.results();
  reference_matrix_scan_forward(p, got["out"], got["last"]);
  const auto read = [&](const char* name, std::initializer_list<int64_t> indices, double absent) {
    const Array* array = c.in.find(name);
    if (!array) return absent;
    int64_t n = 0, i = 0;
    for (int64_t index : indices) n = n * array->shape[i++] + index;
    return array->get(n);
  };
  const auto decay = [&](int64_t b, int64_t t, int64_t h, int64_t n) {
    return p.key_decay ? read("a", {b, t, h, n}, 1) : read("a", {b, t, h}, 1);
  };
  for (int64_t s = 0; s < p.sequences(); ++s) {
    const int64_t b = p.begin.empty() ? s : 0, first = p.begin.empty() ? 0 : p.begin[s];
    const int64_t end = p.begin.empty() ? p.length : p.begin[s + 1];
    const int64_t forth = p.reverse ? -1 : 1, origin = p.reverse ? end - 1 : first;
    for (int64_t t = first; t < end; ++t)
      for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t g = h / (p.heads / p.groups);
        std::vector<double> row(p.keys), out(p.values);
        for (int64_t n = 0; n < p.keys; ++n) row[n] = p.scale * read("q", {b, t, g, n}, 0);
        for (int64_t i = 0; i < p.values; ++i)
          out[i] = read("d", {h, i}, 0) * read("v", {b, t, h, i}, 0);
        for (int64_t r = t;; r -= forth) {
          double weight = 0;  // row^T k_r w_r
          for (int64_t n = 0; n < p.keys; ++n) weight += row[n] * read("k", {b, r, g, n}, 0);
          weight *= read("w", {b, r, h}, 1);
          for (int64_t i = 0; i < p.values; ++i) out[i] += weight * read("v", {b, r, h, i}, 0);
          for (int64_t n = 0; n < p.keys; ++n) {
            if (p.delta) row[n] -= weight * read("k", {b, r, g, n}, 0);
            row[n] *= decay(b, r, h, n);
          }
          if (r == origin) break;
        }
        for (int64_t i = 0; i < p.values; ++i) {
          for (int64_t n = 0; n < p.keys; ++n) out[i] += row[n] * read("initial", {s, h, n, i}, 0);
          const double x = got.find("out")->get(((b * p.length + t) * p.heads + h) * p.values + i);
          CHECK(std::abs(x - out[i]) < 1e-11 * (1 + std::abs(x)), s, t, h, i, x, out[i], c.text);
        }
      }
  }
}

Array values(Shape shape, std::vector<double> x) {
  Array array(DType::f64, std::move(shape));
  for (size_t i = 0; i < x.size(); ++i) array.set(static_cast<int64_t>(i), x[i]);
  return array;
}

void expect_values(const char* what, const Array& got, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK(got.get(static_cast<int64_t>(i)) == expected[i], what, i,
          got.get(static_cast<int64_t>(i)), expected[i]);
}

void check_known() {
  // Three steps, two keys, one value, two heads of one group; states of the first head: 10, 0 and
  // 10, 20 and 310, 20 (without decay).
  const Array q = values({1, 3, 1, 2}, {1, 1, 1, 2, 1, 0}),
              k = values({1, 3, 1, 2}, {1, 0, 0, 1, 1, 0});
  const Array v = values({1, 3, 2, 1}, {10, 1, 20, 2, 300, 3}),
              initial = values({1, 2, 2, 1}, {4, 8, 0, 0});
  const Array half = values({1, 3, 2}, {0.5, 1, 0.5, 0, -0.5, 2}),
              w = values({1, 3, 2}, {1, 2, 1, 2, 1, 2});
  const Array d = values({2, 1}, {1, 0});
  const Array keys = values({1, 3, 2, 2}, {1, 0.5, 1, 1, 1, 0, 1, 1, 0.5, 1, 1, 1});
  Array out = v, last = initial;
  MatrixScan p;
  p.batch = 1, p.length = 3, p.heads = 2, p.groups = 1, p.keys = 2, p.values = 1;
  p.q = q.operand, p.k = k.operand, p.v = v.operand;
  const auto run = [&] { reference_matrix_scan_forward(p, out.operand, last.operand); };
  run();
  expect_values("linear attention", out, {10, 1, 50, 5, 310, 4});
  expect_values("last", last, {310, 20, 4, 2});
  p.reverse = true;
  run();
  expect_values("reverse", out, {330, 6, 340, 7, 300, 3});
  p.reverse = false, p.scale = 2, p.d = d.operand, p.w = w.operand;
  run();
  expect_values("weights", out, {30, 4, 120, 20, 920, 16});
  p.scale = 1, p.d = p.w = {}, p.a = half.operand;
  Array start = initial;
  p.initial = start.operand;
  run();  // (12, 4), (6, 22), (297, -11); (1, 0), (0, 2), (3, 4)
  expect_values("decay", out, {16, 1, 50, 4, 297, 3});
  expect_values("last decayed", last, {297, -11, 3, 4});
  p.a = keys.operand, p.key_decay = true;
  run();  // (14, 4), (14, 20), (307, 20)
  expect_values("decay of keys", out, {18, 1, 54, 5, 307, 4});
  p.a = {}, p.key_decay = false, p.delta = true;
  run();  // each key's value is replaced: (10, 8), (10, 20), (300, 20)
  expect_values("delta rule", out, {18, 1, 50, 5, 300, 3});
  expect_values("last replaced", last, {300, 20, 3, 2});
  p.a = half.operand, p.w = w.operand;
  run();  // w = 1: (10, 4), (5, 20), (300, -10); w = 2: (2, 0), (0, 4), (6, 8)
  expect_values("gated", last, {300, -10, 6, 8});
  p.delta = false, p.a = p.w = p.initial = {}, p.begin = {0, 1, 1, 3};
  Array ends(DType::f64, {3, 2, 2, 1});
  reference_matrix_scan_forward(p, out.operand, ends.operand);
  expect_values("packed", ends, {10, 0, 1, 0, 0, 0, 0, 0, 300, 20, 3, 2});
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
  check_known();
  for (int round = 0; round < rounds; ++round) {
    check_differences();
    check_steps();
    check_matrices();
  }
  return report();
}
