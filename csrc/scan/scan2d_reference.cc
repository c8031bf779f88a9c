// SPDX-License-Identifier: Apache-2.0
// The definitions in scan2d.h, with double sums: each direction is put into scan order and handed to
// the definition of the selective scan.
#include <vector>

#include "scan/scan2d.h"
#include "scan/scan_reference.h"

namespace pentad::scan {
namespace {

using Doubles = std::vector<double>;

Operand rows_of(Doubles& data, int64_t rows, int64_t columns) {
  return {data.data(), DType::f64, {rows * columns, columns, 1}};
}

// One direction of one batch row in scan order, as a scan of doubles.
struct Direction {
  const CrossScan& p;
  const int64_t b, k;
  Doubles u, delta, a, b_steps, c_steps, d, bias;
  SelectiveScan scan;

  Direction(const CrossScan& problem, int64_t batch, int64_t direction)
      : p(problem),
        b(batch),
        k(direction),
        u(p.dim * p.length),
        delta(u.size()),
        a(p.dim * p.states),
        b_steps(p.states * p.length),
        c_steps(b_steps.size()),
        d(p.dim),
        bias(p.dim) {
    for (int64_t t = 0; t < p.length; ++t) {
      for (int64_t c = 0; c < p.dim; ++c) {
        u[c * p.length + t] = at(p.u, b, c, place(t));
        delta[c * p.length + t] = at(p.delta, b, k, c, place(t, p.delta_by_step));
      }
      for (int64_t n = 0; n < p.states; ++n) {
        b_steps[n * p.length + t] = at(p.b, b, k, n, place(t, p.b_by_step));
        c_steps[n * p.length + t] = at(p.c, b, k, n, place(t, p.c_by_step));
      }
    }
    for (int64_t c = 0; c < p.dim; ++c) {
      for (int64_t n = 0; n < p.states; ++n) a[c * p.states + n] = at(p.a, k, c, n);
      if (p.d.data) d[c] = at(p.d, k, c);
      if (p.delta_bias.data) bias[c] = at(p.delta_bias, k, c);
    }
    scan.batch = 1, scan.dim = p.dim, scan.length = p.length, scan.states = p.states;
    scan.softplus = p.softplus;
    scan.u = rows_of(u, p.dim, p.length);
    scan.delta = rows_of(delta, p.dim, p.length);
    scan.a = {a.data(), DType::f64, {p.states, 1}};
    scan.b = coefficient(b_steps);
    scan.c = coefficient(c_steps);
    if (p.d.data) scan.d = {d.data(), DType::f64, {1}};
    if (p.delta_bias.data) scan.delta_bias = {bias.data(), DType::f64, {1}};
  }
  int64_t place(int64_t t, bool by_step = false) const {
    return by_step ? t : p.order[k * p.length + t];
  }
  Operand coefficient(Doubles& steps) const {
    return {steps.data(), DType::f64, {0, 0, p.length, 1}};
  }
};

}  // namespace

void reference_cross_scan_forward(const CrossScan& p, const Operand& out) {
  for (int64_t b = 0; b < p.batch; ++b) {
    Doubles y(p.dim * p.length), sum(y.size());
    for (int64_t k = 0; k < p.directions; ++k) {
      const Direction direction(p, b, k);
      reference_selective_scan_forward(direction.scan, rows_of(y, p.dim, p.length), {});
      for (int64_t c = 0; c < p.dim; ++c)
        for (int64_t t = 0; t < p.length; ++t)
          sum[c * p.length + direction.place(t)] += y[c * p.length + t];
    }
    for (int64_t c = 0; c < p.dim; ++c)
      for (int64_t t = 0; t < p.length; ++t) put(out, sum[c * p.length + t], b, c, t);
  }
}

void reference_cross_scan_backward(const CrossScan& p, const CrossScanGradients& g) {
  const int64_t image = p.dim * p.length, steps = p.states * p.length;
  const int64_t parameters = p.directions * p.dim;
  Doubles da(parameters * p.states), dd(parameters), dbias(parameters);
  for (int64_t b = 0; b < p.batch; ++b) {
    Doubles du(image);
    for (int64_t k = 0; k < p.directions; ++k) {
      const Direction direction(p, b, k);
      Doubles upstream(image), u(image), delta(image), a(p.dim * p.states), b_steps(steps),
          c_steps(steps), d(p.dim), bias(p.dim);
      for (int64_t c = 0; c < p.dim; ++c)
        for (int64_t t = 0; t < p.length; ++t)
          upstream[c * p.length + t] = at(g.d_out, b, c, direction.place(t));
      SelectiveScanGradients of;
      of.d_out = rows_of(upstream, p.dim, p.length);
      of.du = rows_of(u, p.dim, p.length);
      of.ddelta = rows_of(delta, p.dim, p.length);
      of.da = {a.data(), DType::f64, {p.states, 1}};
      of.db = direction.coefficient(b_steps);
      of.dc = direction.coefficient(c_steps);
      if (p.d.data) of.dd = {d.data(), DType::f64, {1}};
      if (p.delta_bias.data) of.ddelta_bias = {bias.data(), DType::f64, {1}};
      reference_selective_scan_backward(direction.scan, of);
      for (int64_t t = 0; t < p.length; ++t) {
        const auto place = [&](bool by_step) { return direction.place(t, by_step); };
        for (int64_t c = 0; c < p.dim; ++c) {
          du[c * p.length + place(false)] += u[c * p.length + t];
          put(g.ddelta, delta[c * p.length + t], b, k, c, place(p.delta_by_step));
        }
        for (int64_t n = 0; n < p.states; ++n) {
          put(g.db, b_steps[n * p.length + t], b, k, n, place(p.b_by_step));
          put(g.dc, c_steps[n * p.length + t], b, k, n, place(p.c_by_step));
        }
      }
      for (int64_t c = 0; c < p.dim; ++c) {
        for (int64_t n = 0; n < p.states; ++n)
          da[(k * p.dim + c) * p.states + n] += a[c * p.states + n];
        dd[k * p.dim + c] += d[c];
        dbias[k * p.dim + c] += bias[c];
      }
    }
    for (int64_t c = 0; c < p.dim; ++c)
      for (int64_t t = 0; t < p.length; ++t) put(g.du, du[c * p.length + t], b, c, t);
  }
  for (int64_t k = 0; k < p.directions; ++k)
    for (int64_t c = 0; c < p.dim; ++c) {
      const int64_t kc = k * p.dim + c;
      for (int64_t n = 0; n < p.states; ++n) put(g.da, da[kc * p.states + n], k, c, n);
      put(g.dd, dd[kc], k, c);
      put(g.ddelta_bias, dbias[kc], k, c);
    }
}

}  // namespace pentad::scan
