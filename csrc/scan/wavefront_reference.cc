// SPDX-License-Identifier: Apache-2.0
// The definition of the recurrence along both axes in scan2d.h: plain loops, double sums.
#include <vector>

#include "scan/scan2d.h"
#include "scan/scan_reference.h"

namespace pentad::scan {
namespace {

// One channel of one batch row: all states, [place][n].
struct Channel {
  const Wavefront& p;
  int64_t b, d;
  std::vector<double> h;

  // How much of each axis counts at (i, j).
  static double share(int64_t axis, int64_t i, int64_t j) {
    if (i && j) return 0.5;
    const bool left = i == 0;
    return left == (axis == 0) ? 1 : 0;
  }
  // The place of the neighbour, or -1.
  int64_t neighbour(int64_t axis, int64_t i, int64_t j) const {
    if (axis == 0) return j ? i * p.width + j - 1 : -1;
    return i ? (i - 1) * p.width + j : -1;
  }
  double u(int64_t place) const { return at(p.u, b, d, place); }
  double delta(int64_t axis, int64_t place) const { return at(p.delta, b, axis, d, place); }
  double decay(int64_t axis, int64_t place, int64_t n) const {
    return std::exp(delta(axis, place) * at(p.a, axis, d, n));
  }

  Channel(const Wavefront& problem, int64_t batch, int64_t channel)
      : p(problem), b(batch), d(channel), h(p.length() * p.states) {
    for (int64_t i = 0; i < p.height; ++i)
      for (int64_t j = 0; j < p.width; ++j)
        for (int64_t n = 0; n < p.states; ++n) {
          const int64_t place = i * p.width + j;
          double sum = 0;
          for (int64_t axis = 0; axis < 2; ++axis) {
            const double s = share(axis, i, j);
            if (s == 0) continue;
            const int64_t from = neighbour(axis, i, j);
            const double before = from < 0 ? 0 : decay(axis, place, n) * h[from * p.states + n];
            sum += s * (before + delta(axis, place) * at(p.b, b, axis, n, place) * u(place));
          }
          h[place * p.states + n] = sum;
        }
  }
};

}  // namespace

void reference_wavefront_forward(const Wavefront& p, const Operand& out) {
  for_each_task(p.batch * p.dim, p.batch * p.dim * p.length() * p.states, [&](int64_t i) {
    const Channel channel(p, i / p.dim, i % p.dim);
    for (int64_t place = 0; place < p.length(); ++place) {
      double y = p.d.data ? at(p.d, channel.d) * channel.u(place) : 0;
      for (int64_t n = 0; n < p.states; ++n)
        y += at(p.c, channel.b, n, place) * channel.h[place * p.states + n];
      put(out, y, channel.b, channel.d, place);
    }
  });
}

void reference_wavefront_backward(const Wavefront& p, const WavefrontGradients& g) {
  const int64_t places = p.length();
  std::vector<double> da(2 * p.dim * p.states), dd(p.dim);
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<double> sums(3 * p.states * places);  // dBl, dBt, dC
    for (int64_t d = 0; d < p.dim; ++d) {
      const Channel channel(p, b, d);
      std::vector<double> grads(places * p.states);
      for (int64_t place = places - 1; place >= 0; --place) {
        const int64_t i = place / p.width, j = place % p.width;
        const double dy = at(g.d_out, b, d, place), u = channel.u(place);
        double du = p.d.data ? at(p.d, d) * dy : 0, ddelta[2] = {};
        dd[d] += dy * u;
        for (int64_t n = 0; n < p.states; ++n) {
          const double grad = grads[place * p.states + n] + dy * at(p.c, b, n, place);
          sums[(2 * p.states + n) * places + place] += dy * channel.h[place * p.states + n];
          for (int64_t axis = 0; axis < 2; ++axis) {
            const double s = Channel::share(axis, i, j);
            if (s == 0) continue;
            const double delta = channel.delta(axis, place), input = at(p.b, b, axis, n, place);
            sums[(axis * p.states + n) * places + place] += s * delta * u * grad;
            du += s * delta * input * grad;
            ddelta[axis] += s * u * input * grad;
            const int64_t from = channel.neighbour(axis, i, j);
            if (from < 0) continue;
            const double passed = s * channel.decay(axis, place, n) * grad;
            grads[from * p.states + n] += passed;
            const double w = passed * channel.h[from * p.states + n];
            ddelta[axis] += at(p.a, axis, d, n) * w;
            da[(axis * p.dim + d) * p.states + n] += delta * w;
          }
        }
        put(g.du, du, b, d, place);
        for (int64_t axis = 0; axis < 2; ++axis) put(g.ddelta, ddelta[axis], b, axis, d, place);
      }
    }
    for (int64_t n = 0; n < p.states; ++n)
      for (int64_t place = 0; place < places; ++place) {
        for (int64_t axis = 0; axis < 2; ++axis)
          put(g.db, sums[(axis * p.states + n) * places + place], b, axis, n, place);
        put(g.dc, sums[(2 * p.states + n) * places + place], b, n, place);
      }
  }
  for (int64_t d = 0; d < p.dim; ++d) {
    for (int64_t axis = 0; axis < 2; ++axis)
      for (int64_t n = 0; n < p.states; ++n)
        put(g.da, da[(axis * p.dim + d) * p.states + n], axis, d, n);
    put(g.dd, dd[d], d);
  }
}

}  // namespace pentad::scan
