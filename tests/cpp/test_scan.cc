// SPDX-License-Identifier: Apache-2.0
// Every entry of scan.h at every level and several numbers of threads against its definition, on
// random problems.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "scan_compare.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;

namespace {

// --- Selective scan --------------------------------------------------------------------------------

void check_scan(DType dtype) {
  const ScanCase c(dtype, false);
  const SelectiveScan& p = c.p;
  const bool store = dtype != DType::f64;
  const size_t stored_size = stored_chunks(p.batch, p.length, !p.begin.empty(), p.sequences()) *
                             p.states * p.parts() * p.dim;
  const auto forward = [&](Arrays& arrays, std::vector<float>& stored) {
    stored.assign(stored_size, NAN);
    selective_scan_forward(p, arrays["out"], arrays["last"], store ? stored.data() : nullptr);
  };
  const bool storing = chance(0.7);
  check_results(
      c.text, c.results(), c.natural, p.length,
      [&](Arrays& to) { reference_selective_scan_forward(p, to["out"], to["last"]); },
      [&](Arrays& to) {
        std::vector<float> stored;
        if (storing) forward(to, stored);
        else selective_scan_forward(p, to["out"], to["last"], nullptr);
      });

  Arrays given;
  if (chance(0.9)) given.add("out", c.array(dtype, c.like_u())).fill([] { return normal(); });
  if (chance(0.5))
    given.add("last", c.array(wide(dtype), c.with_parts(c.like_state()))).fill([] {
      return normal();
    });
  check_results(
      c.text, c.gradients(), c.natural, p.length,
      [&](Arrays& to) { reference_selective_scan_backward(p, c.gradients_of(given, nullptr, to)); },
      [&](Arrays& to) {
        Arrays results = c.results();
        std::vector<float> stored;
        forward(results, stored);
        selective_scan_backward(p, c.gradients_of(given, store ? stored.data() : nullptr, to));
      });
}

// --- One token of a scan ---------------------------------------------------------------------------

struct StateCase : Case<StateUpdate> {
  Array state;

  explicit StateCase(DType type) : Case(type, false), state(type, {}) {
    p.batch = chance(0.05) ? 0 : pick(1, 4);
    p.groups = pick(1, 3);
    p.heads = p.groups * pick(1, 3);
    p.head_dim = channels();
    p.states = chance(0.4) ? 16 : pick(1, 40);
    p.softplus = option("softplus", 0.5);
    int64_t rows = p.batch;
    if (option("rows", 0.5)) {
      rows += pick(0, 2);
      p.rows = random_rows(p.batch, rows);
    }
    size("b", p.batch), size("h", p.heads), size("p", p.head_dim), size("n", p.states);
    text = std::string(" state update ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.states));
    const auto one = [] { return normal(); };
    const Shape like_x = {p.batch, p.heads, p.head_dim}, like_d = {p.heads, p.head_dim};
    const Shape like_b = {p.batch, p.groups, p.states};
    add("x", dtype, like_x, one);
    add("dt", dtype, like_x, one);
    add("a", wide(dtype), {p.heads, p.head_dim, p.states}, [] { return -uniform(0, 2); });
    add("b", dtype, like_b, one);
    add("c", dtype, like_b, one);
    if (option("d", 0.6)) add("d", wide(dtype), like_d, one);
    if (option("z", 0.5)) add("z", dtype, like_x, one);
    if (option("dt_bias", 0.5)) add("dt_bias", wide(dtype), like_d, one);
    const DType dtypes[] = {dtype, DType::f32, DType::bf16, DType::f16};
    state = {dtype == DType::f64 ? dtype : dtypes[pick(0, 3)],
             {rows, p.heads, p.head_dim, p.states},
             false};
    state.fill(one);
    p.x = in["x"], p.dt = in["dt"], p.a = in["a"], p.b = in["b"], p.c = in["c"];
    p.d = in["d"], p.z = in["z"], p.dt_bias = in["dt_bias"];
  }
  StateCase(const StateCase&) = delete;
};

void check_state_update(DType dtype) {
  const StateCase c(dtype);
  Arrays blank;
  blank.add("out", {dtype, {c.p.batch, c.p.heads, c.p.head_dim}, false});
  blank.add("state", c.state);
  const auto at = [&](Arrays& to) {
    StateUpdate p = c.p;
    p.state = to["state"], p.out = to["out"];
    return p;
  };
  check_results(
      c.text, blank, c.natural, 1, [&](Arrays& to) { reference_state_update(at(to)); },
      [&](Arrays& to) { state_update(at(to)); });
}

// --- Projections of a step -------------------------------------------------------------------------

struct LinearCase : Case<FewRowsLinear> {
  explicit LinearCase(DType type) : Case(type, false) {
    p.rows = pick(1, kMostRows);
    // Less than a vector, several, a rest; and what is shared by threads.
    const bool large = chance(0.1);
    p.inputs = large ? pick(600, 1600) : chance(0.3) ? 64 * pick(0, 3) : pick(0, 200);
    p.outputs = large ? pick(300, 700) : chance(0.3) ? 8 * pick(0, 5) : pick(0, 70);
    size("r", p.rows), size("i", p.inputs), size("o", p.outputs);
    text = std::string(" linear ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.inputs));
    const auto one = [] { return normal(); };
    add("x", dtype, {p.rows, p.inputs}, one);
    const int64_t gap = option("gap", 0.3) ? pick(1, 9) : 0;
    in.add("weight", {dtype, {p.outputs, p.inputs + gap}}).fill(one);
    if (option("bias", 0.5)) add("bias", dtype, {p.outputs}, one);
    p.x = in["x"], p.weight = in["weight"], p.bias = in["bias"];
    if (option("shared", 0.1)) p.weight.stride[0] = 0;
  }
  LinearCase(const LinearCase&) = delete;
};

void check_linear(DType dtype) {
  const LinearCase c(dtype);
  Arrays blank;
  blank.add("out", {dtype, {c.p.rows, c.p.outputs}, false});
  check_results(
      c.text, blank, c.natural, c.p.inputs,
      [&](Arrays& to) { reference_few_rows_linear(c.p, to["out"]); },
      [&](Arrays& to) { few_rows_linear(c.p, to["out"]); });
}

// --- Elementwise recurrence ------------------------------------------------------------------------

void check_recurrence(DType dtype) {
  const RecurrenceCase c(dtype, false);
  const Recurrence& p = c.p;
  Arrays blank;
  blank.add("h", {dtype, c.all(), false});
  check_results(
      c.text, blank, c.natural, p.length,
      [&](Arrays& to) { reference_recurrence_forward(p, to["h"]); },
      [&](Arrays& to) { recurrence_forward(p, to["h"]); });
  Array h(dtype, c.all(), false), dh = c.array(dtype, c.all());
  dh.fill([] { return normal(); });
  reference_recurrence_forward(p, h.operand);
  Recurrence given = p;
  given.x = {nullptr, dtype, {}};  // backward does without
  check_results(
      c.text, c.gradients(), c.natural, p.length,
      [&](Arrays& to) { reference_recurrence_backward(given, c.gradients_of(h, dh, to)); },
      [&](Arrays& to) { recurrence_backward(given, c.gradients_of(h, dh, to)); });
}

// --- Causal convolution ----------------------------------------------------------------------------

void check_conv(DType dtype) {
  const ConvCase c(dtype, false);
  const CausalConv& p = c.p;
  check_results(
      c.text, c.results(), c.natural, p.width,
      [&](Arrays& to) { reference_causal_conv_forward(p, to["out"], to["final"]); },
      [&](Arrays& to) { causal_conv_forward(p, to["out"], to["final"]); });
  Arrays given;
  given.add("out", c.array(dtype, c.like_x())).fill([] { return normal(); });
  if (!p.seq_idx && chance(0.4))
    given.add("final", c.array(dtype, c.like_initial())).fill([] { return normal(); });
  check_results(
      c.text, c.gradients(), c.natural, p.length,
      [&](Arrays& to) { reference_causal_conv_backward(p, ConvCase::gradients_of(given, to)); },
      [&](Arrays& to) { causal_conv_backward(p, ConvCase::gradients_of(given, to)); });
}

void check_conv_update(DType dtype) {
  const ConvCase c(dtype, false, true);
  ConvUpdate u;
  u.conv = c.p;
  u.state_length = c.p.width - 1 + (chance(0.5) ? 0 : pick(0, 5));
  int64_t rows = c.p.batch;
  std::string text = c.text + " s" + std::to_string(u.state_length);
  if (chance(0.5)) {
    rows += pick(0, 2);
    u.rows = random_rows(c.p.batch, rows);
    text += " rows";
  }
  if (chance(0.5)) {
    for (int64_t b = 0; b < c.p.batch; ++b) u.positions.push_back(pick(0, 200));
    text += " ring";
  }
  Arrays blank;
  blank.add("out", {dtype, c.like_x(), false});
  Array state(dtype, {rows, c.p.dim, u.state_length}, false);
  state.fill([] { return normal(); });
  blank.add("state", state);
  const auto at = [&](Arrays& to) {
    ConvUpdate update = u;
    update.state = to["state"], update.out = to["out"];
    return update;
  };
  check_results(
      text, blank, c.natural, c.p.width, [&](Arrays& to) { reference_causal_conv_update(at(to)); },
      [&](Arrays& to) { causal_conv_update(at(to)); });
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  for (int round = 0; round < rounds; ++round) {
    for (DType dtype : kDtypes) {
      if (dtype == DType::f64 && round % 8) continue;
      check_scan(dtype);
      check_state_update(dtype);
      check_linear(dtype);
      check_recurrence(dtype);
      check_conv(dtype);
      check_conv_update(dtype);
    }
  }
  std::printf("largest error: %.2f of what is allowed, %s\n", worst, worst_at.c_str());
  return report();
}
