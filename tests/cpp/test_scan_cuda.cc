// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of scan.h, executed on the CPU lane by lane, against the definitions: the random
// problems of test_scan.cc, time in one piece and in several, each order of the lanes.
#include <cstdio>
#include <cstdlib>

#include "orders.h"
#include "scan/scan_cuda.h"
#include "scan_compare.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;
using cuda::Indices;

namespace {

const CudaStream stream;
constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

// A list as an array of its own size, of either integer type.
struct List {
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  Indices indices;

  explicit List(const std::vector<int64_t>& values) {
    if (values.empty()) return;
    indices.count = static_cast<int64_t>(values.size());
    if (chance(0.5)) {
      wide = values;
      indices.data = wide.data();
    } else {
      narrow.assign(values.begin(), values.end());
      indices = {narrow.data(), DType::i32, 1, indices.count};
    }
  }
};

std::vector<uint64_t> room(int64_t bytes) { return std::vector<uint64_t>((bytes + 7) / 8); }

void check(const std::string& what, const Arrays& blank, double natural, int64_t length,
           const std::function<void(Arrays&)>& definition,
           const std::function<void(Arrays&)>& kernel) {
  Arrays expected = blank, got = blank;
  definition(expected);
  kernel(got);
  for (size_t n = 0; n < got.list.size(); ++n)
    compare(got.list[n].first + " of" + what, got.list[n].second, expected.list[n].second, natural,
            length);
}

void check_scan(DType dtype) {
  const ScanCase c(dtype, false);
  const SelectiveScan& given = c.p;
  SelectiveScan p = given;
  p.begin.clear();
  const List begin(given.begin);
  const bool packed = begin.indices.data;
  const int64_t spans = chance(0.5) ? 0 : pick(2, 4);
  const std::string text = c.text + " spans" + std::to_string(spans);
  const size_t stored_size =
      stored_chunks(p.batch, p.length, packed, given.sequences()) * p.states * p.parts() * p.dim;
  const auto forward = [&](Arrays& to, std::vector<float>& stored, bool store) {
    stored.assign(stored_size, NAN);
    auto scratch = room(cuda::selective_scan_forward_scratch(
        p.batch, p.dim, p.length, p.states, p.complex, given.sequences(), packed, spans));
    cuda::selective_scan_forward(stream, p, begin.indices, to["out"], to["last"],
                                 store ? stored.data() : nullptr, scratch.data(), spans);
  };
  std::vector<float> stored;
  check(
      text, c.results(), c.natural, p.length,
      [&](Arrays& to) { reference_selective_scan_forward(given, to["out"], to["last"]); },
      [&](Arrays& to) { forward(to, stored, chance(0.7)); });
  Arrays from;
  if (chance(0.9)) from.add("out", c.array(dtype, c.like_u())).fill([] { return normal(); });
  if (chance(0.5))
    from.add("last", c.array(DType::f32, c.with_parts(c.like_state()))).fill([] {
      return normal();
    });
  Arrays results = c.results();
  forward(results, stored, true);
  check(
      text, c.gradients(), c.natural, p.length,
      [&](Arrays& to) {
        reference_selective_scan_backward(given, c.gradients_of(from, nullptr, to));
      },
      [&](Arrays& to) {
        auto scratch = room(
            cuda::selective_scan_backward_scratch(p.batch, p.dim, p.length, p.states, p.groups,
                                                  p.complex, given.sequences(), packed, spans));
        cuda::selective_scan_backward(stream, p, begin.indices,
                                      c.gradients_of(from, stored.data(), to), scratch.data(),
                                      spans);
      });
}

void check_recurrence(DType dtype) {
  const RecurrenceCase c(dtype, false);
  const Recurrence& p = c.p;
  Arrays blank;
  blank.add("h", {dtype, c.all(), false});
  check(
      c.text, blank, c.natural, p.length,
      [&](Arrays& to) { reference_recurrence_forward(p, to["h"]); },
      [&](Arrays& to) { cuda::recurrence_forward(stream, p, to["h"]); });
  Array h(dtype, c.all(), false), dh = c.array(dtype, c.all());
  dh.fill([] { return normal(); });
  reference_recurrence_forward(p, h.operand);
  Recurrence given = p;
  given.x = {nullptr, dtype, {}};  // backward does without
  check(
      c.text, c.gradients(), c.natural, p.length,
      [&](Arrays& to) { reference_recurrence_backward(given, c.gradients_of(h, dh, to)); },
      [&](Arrays& to) { cuda::recurrence_backward(stream, given, c.gradients_of(h, dh, to)); });
}

void check_conv(DType dtype) {
  const ConvCase c(dtype, false);
  const CausalConv& given = c.p;
  CausalConv p = given;
  p.begin.clear();
  const List begin(given.begin);
  check(
      c.text, c.results(), c.natural, p.width,
      [&](Arrays& to) { reference_causal_conv_forward(given, to["out"], to["final"]); },
      [&](Arrays& to) {
        cuda::causal_conv_forward(stream, p, begin.indices, to["out"], to["final"]);
      });
  Arrays from;
  from.add("out", c.array(dtype, c.like_x())).fill([] { return normal(); });
  if (!p.seq_idx && chance(0.4))
    from.add("final", c.array(dtype, c.like_initial())).fill([] { return normal(); });
  check(
      c.text, c.gradients(), c.natural, p.length,
      [&](Arrays& to) { reference_causal_conv_backward(given, ConvCase::gradients_of(from, to)); },
      [&](Arrays& to) {
        auto scratch = room(cuda::causal_conv_backward_scratch(p.batch, p.dim, p.length, p.width));
        cuda::causal_conv_backward(stream, p, begin.indices, ConvCase::gradients_of(from, to),
                                   scratch.data());
      });
}

void check_conv_update(DType dtype) {
  const ConvCase c(dtype, false, true);
  ConvUpdate u;
  u.conv = c.p;
  u.state_length = c.p.width - 1 + (chance(0.5) ? 0 : pick(0, 5));
  int64_t rows = c.p.batch;
  if (chance(0.5)) {
    rows += pick(0, 2);
    u.rows = random_rows(c.p.batch, rows);
  }
  if (chance(0.5))
    for (int64_t b = 0; b < c.p.batch; ++b) u.positions.push_back(pick(0, 200));
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
  const List list(u.rows), positions(u.positions);
  check(
      c.text + " s" + std::to_string(u.state_length), blank, c.natural, c.p.width,
      [&](Arrays& to) { reference_causal_conv_update(at(to)); },
      [&](Arrays& to) {
        cuda::causal_conv_update(stream, at(to), list.indices, positions.indices, rows);
      });
}

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
  const List rows(c.p.rows);
  check(
      c.text, blank, c.natural, 1, [&](Arrays& to) { reference_state_update(at(to)); },
      [&](Arrays& to) { cuda::state_update(stream, at(to), rows.indices, c.state.shape[0]); });
}

void check_linear(DType dtype) {
  const LinearCase c(dtype);
  Arrays blank;
  blank.add("out", {dtype, {c.p.rows, c.p.outputs}, false});
  check(
      c.text, blank, c.natural, c.p.inputs,
      [&](Arrays& to) { reference_few_rows_linear(c.p, to["out"]); },
      [&](Arrays& to) { cuda::few_rows_linear(stream, c.p, to["out"]); });
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 6;
  const char* only = argc > 2 ? argv[2] : "";
  const auto chosen = [&](const char* name) { return !*only || std::string(only) == name; };
  in_every_order([&] {
    for (int round = 0; round < rounds; ++round) {
      for (DType dtype : kFloats) {
        if (chosen("scan")) check_scan(dtype);
        if (chosen("state")) check_state_update(dtype);
        if (chosen("linear")) check_linear(dtype);
        if (chosen("recurrence")) check_recurrence(dtype);
        if (chosen("conv")) check_conv(dtype);
        if (chosen("update")) check_conv_update(dtype);
      }
    }
  });
  std::printf("largest error: %.2f of what is allowed, %s\n", worst, worst_at.c_str());
  return report();
}
