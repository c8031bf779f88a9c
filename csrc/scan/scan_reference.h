// SPDX-License-Identifier: Apache-2.0
// What the definitions share: elements as doubles, and the steps of a sequence in their order.
#pragma once
#include <complex>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/reals.h"
#include "scan/scan.h"

namespace pentad::scan {

using Complex = std::complex<double>;

// Conjugates and real parts that leave a real number real.
inline double conjugate(double x) { return x; }
inline Complex conjugate(Complex x) { return std::conj(x); }
inline double real_part(double x) { return x; }
inline double real_part(Complex x) { return x.real(); }

inline double at(const Operand& x, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
  return read_real(x.data, x.dtype,
                   i * x.stride[0] + j * x.stride[1] + k * x.stride[2] + l * x.stride[3]);
}
inline void put(const Operand& x, double value, int64_t i, int64_t j = 0, int64_t k = 0,
                int64_t l = 0) {
  if (x.data)
    write_real(x.data, x.dtype,
               i * x.stride[0] + j * x.stride[1] + k * x.stride[2] + l * x.stride[3], value);
}

// A number at this offset whose parts, if it is complex, are `part` apart.
template <class T>
T number(const Operand& x, int64_t offset, int64_t part) {
  const double real = read_real(x.data, x.dtype, offset);
  if constexpr (std::is_same_v<T, double>) return real;
  else return {real, read_real(x.data, x.dtype, offset + part)};
}
template <class T>
void put_number(const Operand& x, int64_t offset, int64_t part, T value) {
  if (!x.data) return;
  write_real(x.data, x.dtype, offset, real_part(value));
  if constexpr (!std::is_same_v<T, double>)
    write_real(x.data, x.dtype, offset + part, value.imag());
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double silu(double x) { return std::isinf(x) && x < 0 ? -0.0 : x * sigmoid(x); }
inline double silu_slope(double x) {
  const double s = sigmoid(x);
  return std::isinf(x) ? s : s * (1 + x * (1 - s));
}

// Sequence s: batch row `b`, and step k in the order of the scan at time[k].
struct Steps {
  int64_t b, first, count;
  bool reverse;

  template <class Problem>
  static Steps of(const Problem& p, int64_t s, bool reverse = false) {
    if (p.begin.empty()) return {s, 0, p.length, reverse};
    return {0, p.begin[s], p.begin[s + 1] - p.begin[s], reverse};
  }
  int64_t time(int64_t k) const { return first + (reverse ? count - 1 - k : k); }
};

// Waking threads costs more than a small problem.
template <class F>
void for_each_task(int64_t tasks, int64_t work, const F& f) {
  if (work < 1 << 13)
    for (int64_t task = 0; task < tasks; ++task) f(task);
  else parallel_for(tasks, f);
}

}  // namespace pentad::scan
