// SPDX-License-Identifier: Apache-2.0
// How far from their definitions the entries of matrix_scan.h may be.
#pragma once
#include <cmath>
#include <functional>
#include <string>

#include "check.h"
#include "common/isa.h"
#include "matrix_case.h"

namespace pentad::scan::test {

// --- What fp32 may be off by -----------------------------------------------------------------------

// f(element) of every array, in f64.
template <class F>
Arrays in_f64(const Arrays& from, const F& f) {
  Arrays to;
  for (const auto& [key, array] : from.list) {
    Array& x = to.add(key.c_str(), {DType::f64, array.shape});
    for (int64_t n = 0; n < x.count(); ++n) x.set(n, f(array.get(n)));
  }
  return to;
}

// Runs the definition on the problem, what is given to it and what it writes.
template <class P>
using Define = std::function<void(const P&, const Arrays& given, const Arrays& to)>;

template <class C, class F>
Arrays defined_in_f64(C& c, const Arrays& given, const Arrays& blank,
                      const Define<decltype(C::p)>& define, const F& f) {
  const Arrays in = in_f64(c.in, f), from = in_f64(given, f);
  Arrays to = in_f64(blank, f);
  c.bind(in);
  define(c.p, from, to);
  c.bind(c.in);
  return to;
}

// Roundings that a number may go through as a random walk, several deviations wide.
inline double walk(double depth) { return 0x1p-24 * (16 + 4 * std::sqrt(depth)); }

// By element, what a sum of fp32 may be off by. Without the delta rule all results are sums of
// products, and a rounding costs a share of its term: the sum of magnitudes is the definition's
// result for absolute values. With it terms cancel from step to step, while the states stay
// bounded: the share is of what small relative changes to the inputs change at most.
template <class C>
Arrays bounds_of(C& c, double depth, const Arrays& given, const Arrays& blank,
                 const Define<decltype(C::p)>& define) {
  const double scale = c.p.scale;
  if (!c.p.delta) {
    c.p.scale = std::abs(scale);
    Arrays sums = defined_in_f64(c, given, blank, define, [](double x) { return std::abs(x); });
    c.p.scale = scale;
    for (auto& [key, array] : sums.list)
      for (int64_t n = 0; n < array.count(); ++n) array.set(n, walk(depth) * array.get(n));
    return sums;
  }
  constexpr double kChange = 0x1p-24;
  Arrays bounds = defined_in_f64(c, given, blank, define, [](double x) { return x; });
  Arrays changed[3];
  for (Arrays& arrays : changed)
    arrays = defined_in_f64(c, given, blank, define, [](double x) {
      return chance(0.5) ? x * (1 + kChange) : x * (1 - kChange);
    });
  for (size_t i = 0; i < bounds.list.size(); ++i) {
    Array& bound = bounds.list[i].second;
    double most = 0;
    for (int64_t n = 0; n < bound.count(); ++n) {
      most = std::max(most, kChange * std::abs(bound.get(n)));
      for (const Arrays& arrays : changed)
        most = std::max(most, std::abs(arrays.list[i].second.get(n) - bound.get(n)));
    }
    bound.fill([&] { return walk(depth) / kChange * most; });
  }
  return bounds;
}

// --- Comparison ------------------------------------------------------------------------------------

inline double worst = 0;  // the largest error as a share of what is allowed
inline std::string worst_at;

// Two neighbours of 16 bits may be what is nearest to nearly the same number.
inline double step_between(DType dtype, double x) {
  if (dtype == DType::f16) return std::max(0x1p-10 * std::abs(x), 0x1p-24);
  return dtype == DType::bf16 ? 0x1p-7 * std::abs(x) : 0;
}

inline void compare(const std::string& what, const Array& got, const Array& expected,
                    const Array& bounds) {
  const DType dtype = expected.operand.dtype;
  bool close = true;
  for (int64_t n = 0; close && n < expected.count(); ++n) {
    const double a = got.get(n), b = expected.get(n);
    // The least numbers of fp32 may be lost.
    const double sums = dtype == DType::f64 ? 0 : bounds.get(n) + 1e-30;
    const double allowed = sums + step_between(dtype, b);
    close = a == b || std::abs(a - b) <= allowed;
    CHECK(close, what, name(isa()), "at", n, "of", expected.count(), a, b, allowed);
    if (size_of(dtype) > 2 && a != b && close && std::abs(a - b) / allowed > worst)
      worst = std::abs(a - b) / allowed, worst_at = what;
  }
  // What lies between the elements is as it was.
  Array gaps = got, untouched = expected;
  gaps.fill([] { return 0; });
  untouched.fill([] { return 0; });
  CHECK(gaps.memory == untouched.memory, what, name(isa()), "between elements");
}

}  // namespace pentad::scan::test
