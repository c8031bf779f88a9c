// SPDX-License-Identifier: Apache-2.0
// The definitions of scan.h against differences, against each other and against what is known by
// hand.
#include <cmath>
#include <cstdlib>
#include <functional>

#include "check.h"
#include "scan_case.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;

namespace {

void check_slopes_of_all() {
  ScanCase scan(DType::f64, true);
  check_slopes(
      scan, scan.results(),
      [&](const Arrays& to) { reference_selective_scan_forward(scan.p, to["out"], to["last"]); },
      [&](const Arrays& given, const Arrays& to) {
        reference_selective_scan_backward(scan.p, scan.gradients_of(given, nullptr, to));
      });
  RecurrenceCase recurrence(DType::f64, true);
  Arrays h;
  h.add("h", {DType::f64, recurrence.all(), false});
  check_slopes(
      recurrence, h, [&](const Arrays& to) { reference_recurrence_forward(recurrence.p, to["h"]); },
      [&](const Arrays& given, const Arrays& to) {
        Array states = *h.find("h");
        reference_recurrence_forward(recurrence.p, states.operand);
        reference_recurrence_backward(recurrence.p,
                                      recurrence.gradients_of(states, *given.find("h"), to));
      });
  ConvCase conv(DType::f64, true);
  check_slopes(
      conv, conv.results(),
      [&](const Arrays& to) { reference_causal_conv_forward(conv.p, to["out"], to["final"]); },
      [&](const Arrays& given, const Arrays& to) {
        reference_causal_conv_backward(conv.p, ConvCase::gradients_of(given, to));
      });
}

// Token by token on a cache is the whole at once.
void check_steps() {
  ScanCase c(DType::f64, true);
  if (!c.p.complex && c.p.begin.empty() && !c.p.reverse && !c.p.constant_b && !c.p.constant_c) {
    Arrays whole = c.results();
    reference_selective_scan_forward(c.p, whole["out"], whole["last"]);
    Array state(DType::f64, {c.p.batch, c.p.dim, c.p.states}), out(DType::f64, c.like_u());
    for (int64_t i = 0; i < state.count(); ++i)
      state.set(i, c.in.find("initial") ? c.in.find("initial")->get(i) : 0);
    for (int64_t t = 0; t < c.p.length; ++t) {
      StateUpdate p;
      p.batch = c.p.batch, p.heads = c.p.dim, p.head_dim = 1, p.states = c.p.states;
      p.groups = c.p.groups, p.softplus = c.p.softplus;
      // Index p of the head dimension is always 0.
      const auto step = [&](const Operand& x) {
        const int64_t from = t * x.stride[2];
        return Operand{x.data ? static_cast<double*>(x.data) + from : nullptr,
                       DType::f64,
                       {x.stride[0], x.stride[1], 0}};
      };
      const auto coefficient = [&](const Operand& x) {
        return Operand{static_cast<double*>(x.data) + t * x.stride[3],
                       DType::f64,
                       {x.stride[0], x.stride[1], x.stride[2]}};
      };
      p.x = step(c.p.u), p.dt = step(c.p.delta), p.z = step(c.p.z), p.out = step(out.operand);
      p.b = coefficient(c.p.b), p.c = coefficient(c.p.c);
      p.a = {c.p.a.data, DType::f64, {c.p.a.stride[0], 0, c.p.a.stride[1]}};
      p.d = {c.p.d.data, DType::f64, {c.p.d.stride[0], 0}};
      p.dt_bias = {c.p.delta_bias.data, DType::f64, {c.p.delta_bias.stride[0], 0}};
      p.state = {state.operand.data, DType::f64, {state.operand.stride[0], c.p.states, 0, 1}};
      state_update(p);
    }
    for (int64_t i = 0; i < out.count(); ++i) {
      const double x = whole.find("out")->get(i);
      CHECK(std::abs(out.get(i) - x) < 1e-12 * (1 + std::abs(x)), i, out.get(i), x, c.text);
    }
    for (int64_t i = 0; i < state.count(); ++i)
      CHECK(state.get(i) == whole.find("last")->get(i), i, c.text);
  }

  ConvCase conv(DType::f64, true);
  if (conv.p.seq_idx || !conv.p.begin.empty()) return;
  const CausalConv& p = conv.p;
  Arrays whole = conv.results();
  reference_causal_conv_forward(p, whole["out"], whole["final"]);
  for (const bool ring : {false, true}) {
    const int64_t before = p.width - 1, size = before + pick(0, 3), start = pick(0, 9);
    Array state(DType::f64, {p.batch, p.dim, size}), out(DType::f64, conv.like_x());
    const auto slot = [&](int64_t i) {  // of input i, counted from the first new one
      return ring ? ((start + i) % size + size) % size : size + i;
    };
    for (int64_t n = 0; n < p.batch * p.dim; ++n)
      for (int64_t i = 0; i < before; ++i)
        state.set(n * size + slot(i - before),
                  p.initial.data ? conv.in.find("initial")->get(n * before + i) : 0);
    for (int64_t t = 0; t < p.length;) {
      ConvUpdate u;
      u.conv = p, u.conv.initial = {}, u.conv.length = std::min(pick(1, 3), p.length - t);
      u.conv.x.data = static_cast<double*>(p.x.data) + t * p.x.stride[2];
      u.state = state.operand, u.state_length = size, u.out = out.operand;
      u.out.data = static_cast<double*>(out.operand.data) + t * out.operand.stride[2];
      if (ring) u.positions.assign(p.batch, start + t);
      causal_conv_update(u);
      t += u.conv.length;
    }
    for (int64_t i = 0; i < out.count(); ++i)
      CHECK(out.get(i) == whole.find("out")->get(i), ring, i, conv.text);
    for (int64_t n = 0; n < p.batch * p.dim; ++n)
      for (int64_t i = 0; i < before; ++i)
        CHECK(state.get(n * size + (ring ? slot(p.length - before + i) : size - before + i)) ==
                  whole.find("final")->get(n * before + i),
              ring, i, conv.text);
  }
}

Array values(Shape shape, std::vector<double> x) {
  Array array(DType::f64, std::move(shape));
  for (size_t i = 0; i < x.size(); ++i) array.set(static_cast<int64_t>(i), x[i]);
  return array;
}

void expect_values(const char* what, const Array& got, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK(std::abs(got.get(static_cast<int64_t>(i)) - expected[i]) < 1e-12, what, i,
          got.get(static_cast<int64_t>(i)), expected[i]);
}

void check_known() {
  // Decays of 1/2 by softplus-free dt = ln 2 and A = -1; two groups of one channel; D and z.
  const double ln2 = std::log(2.0), gate = 1 / (1 + std::exp(-1.0));
  const Array u = values({1, 2, 3}, {1, 2, 3, 4, 5, 6});
  const Array delta = values({1, 2, 3}, {ln2, ln2, ln2, ln2, ln2, ln2});
  const Array a = values({2, 1}, {-1, -1}), b = values({1, 2, 1, 3}, {1, 1, 1, 2, 2, 2});
  const Array c = values({1, 2, 1, 3}, {1, 1, 1, 1, 0, 1}), d = values({2}, {10, 0});
  const Array z = values({1, 2, 3}, {1, 1, 1, 1, 1, 1}), initial = values({1, 2, 1}, {ln2, 0});
  Array out = u, last = initial;
  SelectiveScan p;
  p.batch = 1, p.dim = 2, p.length = 3, p.states = 1, p.groups = 2;
  p.u = u.operand, p.delta = delta.operand, p.a = a.operand, p.b = b.operand, p.c = c.operand;
  p.d = d.operand, p.z = z.operand, p.initial = initial.operand;
  reference_selective_scan_forward(p, out.operand, last.operand);
  expect_values("scan", out,
                {gate * (1.5 * ln2 + 10), gate * (2.75 * ln2 + 20), gate * (4.375 * ln2 + 30),
                 gate * 8 * ln2, 0, gate * 19 * ln2});
  expect_values("last", last, {4.375 * ln2, 19 * ln2});
  p.z = {}, p.d = {}, p.reverse = true;
  reference_selective_scan_forward(p, out.operand, last.operand);
  expect_values("reverse", last, {2.875 * ln2, 16 * ln2});
  p.reverse = false, p.initial = {}, p.begin = {0, 1, 1, 3};
  Array ends(DType::f64, {3, 2, 1});
  reference_selective_scan_forward(p, out.operand, ends.operand);
  expect_values("packed", ends, {ln2, 8 * ln2, 0, 0, 4 * ln2, 17 * ln2});
  // softplus(0) = ln 2; above 20 it is x.
  const Array zero = values({1, 2, 3}, {0, 0, 0, 0, 0, 21});
  p.begin.clear(), p.softplus = true, p.delta = zero.operand;
  reference_selective_scan_forward(p, out.operand, last.operand);
  expect_values("softplus", last, {4.25 * ln2, 14 * ln2 * std::exp(-21.0) + 21 * 12});
  // A quarter turn per step: 2 Re of 1, i, -1, then u = 0.
  const Array turn = values({1, 1, 2}, {0, std::acos(0.0)}), one = values({1, 1, 2}, {1, 0});
  const Array impulse = values({1, 1, 3}, {1, 0, 0}), steps = values({1, 1, 3}, {1, 1, 1});
  SelectiveScan q;
  q.complex = q.constant_b = q.constant_c = true;
  q.batch = q.dim = q.states = 1, q.length = 3;
  q.u = impulse.operand, q.delta = steps.operand, q.a = turn.operand;
  q.b = q.c = one.operand;
  reference_selective_scan_forward(q, out.operand, {});
  expect_values("complex", out, {2, 0, -2});

  const Array half = values({1, 1, 3}, {0.5, 0.5, 0.25}), h0 = values({1, 1}, {4});
  Recurrence r;
  r.outer = r.inner = 1, r.length = 3;
  r.a = half.operand, r.x = steps.operand, r.h0 = h0.operand;
  reference_recurrence_forward(r, out.operand);
  expect_values("recurrence", out, {3, 2.5, 1.625});
  r.reverse = true;
  reference_recurrence_forward(r, out.operand);
  expect_values("reverse recurrence", out, {2, 2, 2});
  r.log_space = true, r.a = impulse.operand;
  reference_recurrence_forward(r, out.operand);
  expect_values("log space", out, {1 + 6 * std::exp(1.0), 6, 5});

  const Array weight = values({1, 3}, {1, 10, 100}), bias = values({1}, {0.5});
  const Array before = values({1, 1, 2}, {7, 8}), x = values({1, 1, 3}, {1, 2, 3});
  CausalConv v;
  v.batch = v.dim = 1, v.length = v.width = 3;
  v.x = x.operand, v.weight = weight.operand, v.bias = bias.operand;
  reference_causal_conv_forward(v, out.operand, last.operand);
  expect_values("conv", out, {100.5, 210.5, 321.5});
  expect_values("final", last, {2, 3});
  v.initial = before.operand;
  reference_causal_conv_forward(v, out.operand, {});
  expect_values("conv with initial states", out, {187.5, 218.5, 321.5});
  const int32_t seq_idx[] = {0, -1, 0};
  v.initial = {}, v.seq_idx = seq_idx, v.seq_idx_stride[1] = 1;
  reference_causal_conv_forward(v, out.operand, {});
  expect_values("conv with seq_idx", out, {100.5, 0, 301.5});
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  check_known();
  for (int round = 0; round < rounds; ++round) {
    check_slopes_of_all();
    check_steps();
  }
  return report();
}
