// SPDX-License-Identifier: Apache-2.0
// Every entry of scan2d.h at every level and several numbers of threads against its definition, on
// random problems; and the definitions against differences.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "scan2d_case.h"
#include "scan_compare.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;

namespace {

struct CrossEntries {
  typedef CrossCase C;
  static void define(const CrossScan& p, const Operand& out) {
    reference_cross_scan_forward(p, out);
  }
  static void define(const CrossScan& p, const CrossScanGradients& g) {
    reference_cross_scan_backward(p, g);
  }
  static void run(const CrossScan& p, const Operand& out, float* stored) {
    cross_scan_forward(p, out, stored);
  }
  static void run(const CrossScan& p, const CrossScanGradients& g) { cross_scan_backward(p, g); }
};

struct WavefrontEntries {
  typedef WavefrontCase C;
  static void define(const Wavefront& p, const Operand& out) {
    reference_wavefront_forward(p, out);
  }
  static void define(const Wavefront& p, const WavefrontGradients& g) {
    reference_wavefront_backward(p, g);
  }
  static void run(const Wavefront& p, const Operand& out, float* stored) {
    wavefront_forward(p, out, stored);
  }
  static void run(const Wavefront& p, const WavefrontGradients& g) { wavefront_backward(p, g); }
};

template <class Entries>
void check_image(DType dtype) {
  typedef typename Entries::C C;
  const C c(dtype, false);
  const auto& p = c.p;
  const bool store = dtype != DType::f64, storing = store && chance(0.7);
  const auto forward = [&](const Arrays& to) {
    std::vector<float> stored(storing ? c.stored_size() : 0, NAN);
    Entries::run(p, to["out"], storing ? stored.data() : nullptr);
  };
  const int64_t depth = c.places() + p.states;
  check_results(
      c.text, c.results(), c.natural, depth, [&](Arrays& to) { Entries::define(p, to["out"]); },
      forward);
  Array d_out = c.array(dtype, c.in.find("u")->shape);
  d_out.fill([] { return normal(); });
  check_results(
      c.text, c.gradients(), c.natural, depth + p.batch + p.dim,
      [&](Arrays& to) { Entries::define(p, C::gradients_of(d_out.operand, nullptr, to)); },
      [&](Arrays& to) {
        const Arrays results = c.results();
        std::vector<float> stored(store ? c.stored_size() : 0, NAN);
        Entries::run(p, results["out"], store ? stored.data() : nullptr);
        Entries::run(p, C::gradients_of(d_out.operand, store ? stored.data() : nullptr, to));
      });
}

template <class Entries>
void check_differences() {
  typename Entries::C c(DType::f64, true);
  check_slopes(
      c, c.results(), [&](const Arrays& to) { Entries::define(c.p, to["out"]); },
      [&](const Arrays& given, const Arrays& to) {
        Entries::define(c.p, Entries::C::gradients_of(given["out"], nullptr, to));
      });
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  for (int round = 0; round < rounds; ++round) {
    for (DType dtype : kDtypes) {
      if (dtype == DType::f64 && round % 8) continue;
      check_image<CrossEntries>(dtype);
      check_image<WavefrontEntries>(dtype);
    }
    check_differences<CrossEntries>();
    check_differences<WavefrontEntries>();
  }
  std::printf("largest error: %.2f of what is allowed, %s\n", worst, worst_at.c_str());
  return report();
}
