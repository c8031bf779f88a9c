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
