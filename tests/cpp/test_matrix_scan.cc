// SPDX-License-Identifier: Apache-2.0
// Every entry of matrix_scan.h at every level and several numbers of threads against its definition,
// on random problems.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "matrix_compare.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;

namespace {

template <class C>
void check_results(C& c, const char* entry, double depth, const Arrays& given, const Arrays& blank,
                   const Define<decltype(C::p)>& define,
                   const std::function<std::function<void(const Arrays& to)>()>& prepare) {
  const std::string text = std::string(" of ") + entry + c.text;
  set_num_threads(2);
  const Arrays expected = blank, bounds = bounds_of(c, depth, given, blank, define);
  define(c.p, given, expected);
  for (Isa level : isa_available()) {
    set_isa(level);
    set_num_threads(2);
    const auto kernel = prepare();
    Arrays first;
    for (int threads : {1, 2, 3, 8}) {
      set_num_threads(threads);
      const Arrays got = blank;
      kernel(got);
      if (threads == 1) first = got;
      for (size_t n = 0; n < got.list.size(); ++n) {
        const std::string what = got.list[n].first + text;
        if (threads == 1)
          compare(what, got.list[n].second, expected.list[n].second, bounds.list[n].second);
        CHECK(got.list[n].second.memory == first.list[n].second.memory, threads, "threads", what,
              name(isa()));
      }
    }
  }
}

// --- Entries ---------------------------------------------------------------------------------------

Operand from_step(Operand x, int64_t t) {
  if (x.data) x.data = static_cast<uint8_t*>(x.data) + t * x.stride[1] * size_of(x.dtype);
  return x;
}

// The whole in two or three pieces, each from the state that the one before it left.
void forward_by_pieces(const MatrixScan& whole, const Arrays& to) {
  std::vector<int64_t> cuts = {0, pick(0, whole.length), pick(0, whole.length), whole.length};
  std::sort(cuts.begin(), cuts.end());
  const Array* last = to.find("last");
  Array before(wide(whole.v.dtype), {whole.batch, whole.heads, whole.keys, whole.values});
  Array after = before;
  for (size_t n = 0; n + 1 < cuts.size(); ++n) {
    const size_t i = whole.reverse ? cuts.size() - 2 - n : n;
    MatrixScan p = whole;
    p.length = cuts[i + 1] - cuts[i];
    for (Operand* x : {&p.q, &p.k, &p.v, &p.a, &p.w}) *x = from_step(*x, cuts[i]);
    if (n) p.initial = before.operand;
    const bool ends = n + 2 == cuts.size();
    matrix_scan_forward(p, from_step(to["out"], cuts[i]),
                        !ends  ? after.operand
                        : last ? last->operand
                               : Operand{},
                        nullptr);
    std::swap(before, after);
  }
}

double depth_of(const MatrixScan& p) {
  return static_cast<double>(p.batch * p.length + p.keys + p.values + p.heads);
}

void check_scan(DType dtype) {
  MatrixCase c(dtype, false);
  const MatrixScan& p = c.p;
  const bool store = dtype != DType::f64, storing = chance(0.5);
  const Define<MatrixScan> define = [](const MatrixScan& q, const Arrays&, const Arrays& to) {
    reference_matrix_scan_forward(q, to["out"], to["last"]);
  };
  check_results(c, "forward", depth_of(p), {}, c.results(), define, [&] {
    return [&](const Arrays& to) {
      std::vector<float> stored(storing && store ? c.stored_size() : 0, NAN);
      matrix_scan_forward(p, to["out"], to["last"], storing && store ? stored.data() : nullptr);
    };
  });
  if (p.begin.empty() && chance(0.3)) {
    const uint32_t seed = static_cast<uint32_t>(pick(0, 1 << 30));
    check_results(c, "pieces", depth_of(p), {}, c.results(), define, [&] {
      return [&, seed](const Arrays& to) {
        const std::mt19937 kept = generator;
        generator.seed(seed);  // the same cuts whenever
        forward_by_pieces(p, to);
        generator = kept;
      };
    });
  }

  Arrays given;
  if (chance(0.9)) given.add("out", c.array(c.out_dtype, c.like_v())).fill([] { return normal(); });
  if (chance(0.5))
    given.add("last", c.array(wide(dtype), c.like_state())).fill([] { return normal(); });
  std::vector<float> stored;
  check_results(
      c, "backward", depth_of(p), given, c.gradients(),
      [](const MatrixScan& q, const Arrays& from, const Arrays& to) {
        reference_matrix_scan_backward(q, MatrixCase::gradients_of(from, nullptr, to));
      },
      [&] {
        const Arrays results = c.results();
        stored.assign(store ? c.stored_size() : 0, NAN);
        matrix_scan_forward(p, results["out"], {}, store ? stored.data() : nullptr);
        return [&](const Arrays& to) {
          matrix_scan_backward(
              p, MatrixCase::gradients_of(given, store ? stored.data() : nullptr, to));
        };
      });
}

void check_update(DType dtype) {
  MatrixUpdateCase c(dtype);
  const auto at = [](const MatrixUpdate& from, const Arrays& to) {
    MatrixUpdate p = from;
    p.state = to["state"], p.out = to["out"];
    return p;
  };
  const double depth = static_cast<double>(c.p.keys);
  check_results(
      c, "", depth, {}, c.results(),
      [&](const MatrixUpdate& p, const Arrays&, const Arrays& to) {
        reference_matrix_update(at(p, to));
      },
      [&] { return [&](const Arrays& to) { matrix_update(at(c.p, to)); }; });
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 12;
  for (int round = 0; round < rounds; ++round) {
    for (DType dtype : kDtypes) {
      if (dtype == DType::f64 && round % 4) continue;
      check_scan(dtype);
      for (int i = 0; i < 3; ++i) check_update(dtype);
    }
  }
  std::printf("largest error: %.2f of what is allowed, %s\n", worst, worst_at.c_str());
  return report();
}
