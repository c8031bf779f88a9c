// SPDX-License-Identifier: Apache-2.0
// Results of the entries of scan.h and scan2d.h at every level and several numbers of threads beside
// those of their definitions.
#pragma once
#include <cmath>
#include <functional>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "scan_case.h"

namespace pentad::scan::test {

inline double worst = 0;  // the largest error as a share of what is allowed
inline std::string worst_at;

// Two neighbours of 16 bits may be what is nearest to nearly the same number.
inline double step_between(DType dtype) {
  return dtype == DType::f16 ? 0x1p-10 : dtype == DType::bf16 ? 0x1p-7 : 0;
}

// Each element may be off by a rounding, and by what fp32 sums over so many steps may be off by,
// relative to the largest that is summed. f64 takes the reference's own path.
inline void compare(const std::string& what, const Array& got, const Array& expected,
                    double natural, int64_t length) {
  double most = natural;
  for (int64_t i = 0; i < expected.count(); ++i)
    if (std::isfinite(expected.get(i))) most = std::max(most, std::abs(expected.get(i)));
  const DType dtype = expected.operand.dtype;
  const double sums = dtype == DType::f64 ? 0 : (1e-5 + 5e-7 * static_cast<double>(length)) * most;
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double a = got.value(i), b = expected.value(i);
    const double allowed = sums + step_between(dtype) * std::abs(b);
    const bool same = a == b || (std::isnan(a) && std::isnan(b));
    const bool close = same || std::abs(a - b) <= allowed;
    if (!same && close && std::abs(a - b) / allowed > worst) {
      worst = std::abs(a - b) / allowed;
      worst_at = what;
    }
    CHECK(close, what, name(isa()), "at", i, a, b, allowed);
    if (!close) return;
  }
}

using Run = std::function<void(Arrays&)>;

// Both write into copies of `blank`; the kernel gives the same bits at 1, 2 and 3 threads.
inline void check_results(const std::string& what, const Arrays& blank, double natural,
                          int64_t length, const Run& definition, const Run& kernel) {
  Arrays expected = blank;
  set_num_threads(2);
  definition(expected);
  for (Isa level : isa_available()) {
    set_isa(level);
    Arrays first;
    for (int threads : {1, 2, 3}) {
      set_num_threads(threads);
      Arrays got = blank;
      kernel(got);
      if (threads == 1) {
        first = got;
        for (size_t n = 0; n < got.list.size(); ++n)
          compare(got.list[n].first + " of" + what, got.list[n].second, expected.list[n].second,
                  natural, length);
      }
      for (size_t n = 0; n < got.list.size(); ++n)
        CHECK(got.list[n].second.memory == first.list[n].second.memory, threads, "threads",
              got.list[n].first, "of" + what, name(isa()));
    }
  }
}

}  // namespace pentad::scan::test
