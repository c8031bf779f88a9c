// SPDX-License-Identifier: Apache-2.0
// The definitions in scan.h, as loops: the selective scan, its one-token step and the projections of
// that, the elementwise recurrence.
#include "scan/scan_reference.h"

namespace pentad::scan {
namespace {

double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// --- One channel of one sequence -------------------------------------------------------------------

template <class T>
struct Channel {
  const SelectiveScan& p;
  const int64_t s, d;
  const Steps steps;
  // y takes the real part twice where numbers are complex: a conjugate pair of states.
  static constexpr double kTwice = std::is_same_v<T, double> ? 1 : 2;

  Channel(const SelectiveScan& problem, int64_t sequence, int64_t channel)
      : p(problem), s(sequence), d(channel), steps(Steps::of(problem, sequence, problem.reverse)) {}

  int64_t group() const { return d / (p.dim / p.groups); }
  double shifted_delta(int64_t t) const {
    return at(p.delta, steps.b, d, t) + (p.delta_bias.data ? at(p.delta_bias, d) : 0);
  }
  double dt(int64_t t) const {
    const double x = shifted_delta(t);
    return p.softplus ? softplus(x) : x;
  }
  double u(int64_t t) const { return at(p.u, steps.b, d, t); }
  T a(int64_t n) const {
    return number<T>(p.a, d * p.a.stride[0] + n * p.a.stride[1], p.a.stride[2]);
  }
  T coefficient(const Operand& x, bool constant, int64_t n, int64_t t) const {
    const int64_t* stride = x.stride;
    if (constant) return number<T>(x, d * stride[0] + n * stride[1], stride[2]);
    return number<T>(x, steps.b * stride[0] + group() * stride[1] + n * stride[2] + t * stride[3],
                     stride[4]);
  }
  T b(int64_t n, int64_t t) const { return coefficient(p.b, p.constant_b, n, t); }
  T c(int64_t n, int64_t t) const { return coefficient(p.c, p.constant_c, n, t); }

  // (s, d, n, part)
  T state(const Operand& x, int64_t n) const {
    if (!x.data) return 0;
    return number<T>(x, s * x.stride[0] + d * x.stride[1] + n * x.stride[2], x.stride[3]);
  }
  void put_state(const Operand& x, int64_t n, T value) const {
    put_number<T>(x, s * x.stride[0] + d * x.stride[1] + n * x.stride[2], x.stride[3], value);
  }

  void step(int64_t t, T* h) const {
    const double dt = this->dt(t), u = this->u(t);
    for (int64_t n = 0; n < p.states; ++n) h[n] = std::exp(dt * a(n)) * h[n] + dt * u * b(n, t);
  }
  double y(int64_t t, const T* h) const {
    double sum = 0;
    for (int64_t n = 0; n < p.states; ++n) sum += kTwice * real_part(c(n, t) * h[n]);
    return p.d.data ? sum + at(p.d, d) * u(t) : sum;
  }
};

template <class T>
void scan_channel(const Channel<T>& channel, const Operand& out, const Operand& last) {
  const SelectiveScan& p = channel.p;
  const Steps& steps = channel.steps;
  std::vector<T> h(p.states);
  for (int64_t n = 0; n < p.states; ++n) h[n] = channel.state(p.initial, n);
  for (int64_t k = 0; k < steps.count; ++k) {
    const int64_t t = steps.time(k);
    channel.step(t, h.data());
    const double y = channel.y(t, h.data());
    put(out, p.z.data ? y * silu(at(p.z, steps.b, channel.d, t)) : y, steps.b, channel.d, t);
  }
  for (int64_t n = 0; n < p.states; ++n) channel.put_state(last, n, h[n]);
}

template <class T>
void scan_forward(const SelectiveScan& p, const Operand& out, const Operand& last) {
  for_each_task(p.sequences() * p.dim, p.batch * p.dim * p.length * p.states, [&](int64_t task) {
    scan_channel(Channel<T>(p, task / p.dim, task % p.dim), out, last);
  });
}

// --- Backward --------------------------------------------------------------------------------------

// What one sequence adds to gradients that sum over sequences or channels.
template <class T>
struct Sums {
  std::vector<T> da, db_constant, dc_constant;  // [d][n]
  std::vector<double> dd, ddelta_bias;          // [d]

  explicit Sums(const SelectiveScan& p)
      : da(p.dim * p.states),
        db_constant(p.dim * p.states),
        dc_constant(p.dim * p.states),
        dd(p.dim),
        ddelta_bias(p.dim) {}
};

// db and dc: [n][k] of the channel's group, to be added to.
template <class T>
void scan_channel_backward(const Channel<T>& channel, const SelectiveScanGradients& g, T* db, T* dc,
                           Sums<T>& sums) {
  const SelectiveScan& p = channel.p;
  const Steps& steps = channel.steps;
  const int64_t d = channel.d, states = p.states, length = steps.count;
  std::vector<T> h((length + 1) * states);  // [k][n], before step k
  for (int64_t n = 0; n < states; ++n) h[n] = channel.state(p.initial, n);
  for (int64_t k = 0; k < length; ++k) {
    std::copy_n(&h[k * states], states, &h[(k + 1) * states]);
    channel.step(steps.time(k), &h[(k + 1) * states]);
  }
  std::vector<T> carry(states);  // exp(dt_{t+1} A) g_{t+1}
  for (int64_t n = 0; n < states; ++n) carry[n] = channel.state(g.d_last, n);
  for (int64_t k = length - 1; k >= 0; --k) {
    const int64_t t = steps.time(k);
    const T *before = &h[k * states], *after = before + states;
    double dy = g.d_out.data ? at(g.d_out, steps.b, d, t) : 0;
    if (p.z.data) {
      const double z = at(p.z, steps.b, d, t);
      put(g.dz, dy * channel.y(t, after) * silu_slope(z), steps.b, d, t);
      dy *= silu(z);
    }
    const double dt = channel.dt(t), u = channel.u(t);
    double sum_gb = 0, sum_aw = 0;
    for (int64_t n = 0; n < states; ++n) {
      const T a = channel.a(n), decay = std::exp(dt * a), b = channel.b(n, t);
      const T gradient = Channel<T>::kTwice * dy * conjugate(channel.c(n, t)) + carry[n];
      const T dc_here = Channel<T>::kTwice * dy * conjugate(after[n]), db_here = dt * u * gradient;
      (p.constant_c ? sums.dc_constant[d * states + n] : dc[n * length + k]) += dc_here;
      (p.constant_b ? sums.db_constant[d * states + n] : db[n * length + k]) += db_here;
      const T w = gradient * conjugate(decay * before[n]);
      sums.da[d * states + n] += dt * w;
      sum_gb += real_part(gradient * conjugate(b));
      sum_aw += real_part(w * conjugate(a));
      carry[n] = conjugate(decay) * gradient;
    }
    double ddelta = u * sum_gb + sum_aw;
    if (p.softplus) ddelta *= sigmoid(channel.shifted_delta(t));
    put(g.ddelta, ddelta, steps.b, d, t);
    put(g.du, dt * sum_gb + (p.d.data ? at(p.d, d) * dy : 0), steps.b, d, t);
    sums.ddelta_bias[d] += ddelta;
    sums.dd[d] += u * dy;
  }
  for (int64_t n = 0; n < states; ++n) channel.put_state(g.dinitial, n, carry[n]);
}

template <class T>
void put_coefficients(const SelectiveScan& p, const Operand& x, const Steps& steps, int64_t group,
                      const std::vector<T>& sums) {
  for (int64_t n = 0; n < p.states; ++n)
    for (int64_t k = 0; k < steps.count; ++k)
      put_number<T>(x,
                    steps.b * x.stride[0] + group * x.stride[1] + n * x.stride[2] +
                        steps.time(k) * x.stride[3],
                    x.stride[4], sums[n * steps.count + k]);
}

// (d, n, part), summed over sequences in their order.
template <class T>
void put_constant(const SelectiveScan& p, const Operand& x, const std::vector<Sums<T>>& sums,
                  std::vector<T> Sums<T>::* member) {
  for (int64_t d = 0; d < p.dim; ++d)
    for (int64_t n = 0; n < p.states; ++n) {
      T sum = 0;
      for (const Sums<T>& part : sums) sum += (part.*member)[d * p.states + n];
      put_number<T>(x, d * x.stride[0] + n * x.stride[1], x.stride[2], sum);
    }
}

template <class T>
void scan_backward(const SelectiveScan& p, const SelectiveScanGradients& g) {
  const int64_t width = p.dim / p.groups;
  std::vector<Sums<T>> sums(p.sequences(), Sums<T>(p));
  for_each_task(p.sequences() * p.groups, p.batch * p.dim * p.length * p.states, [&](int64_t task) {
    const int64_t s = task / p.groups, group = task % p.groups;
    const Steps steps = Steps::of(p, s, p.reverse);
    std::vector<T> db(p.states * steps.count), dc(p.states * steps.count);
    for (int64_t d = group * width; d < (group + 1) * width; ++d)
      scan_channel_backward(Channel<T>(p, s, d), g, db.data(), dc.data(), sums[s]);
    if (!p.constant_b) put_coefficients(p, g.db, steps, group, db);
    if (!p.constant_c) put_coefficients(p, g.dc, steps, group, dc);
  });
  put_constant(p, g.da, sums, &Sums<T>::da);
  if (p.constant_b) put_constant(p, g.db, sums, &Sums<T>::db_constant);
  if (p.constant_c) put_constant(p, g.dc, sums, &Sums<T>::dc_constant);
  for (int64_t d = 0; d < p.dim; ++d) {
    double dd = 0, ddelta_bias = 0;
    for (const Sums<T>& part : sums) dd += part.dd[d], ddelta_bias += part.ddelta_bias[d];
    put(g.dd, dd, d);
    put(g.ddelta_bias, ddelta_bias, d);
  }
}

// --- Elementwise recurrence ------------------------------------------------------------------------

int64_t offset(const Operand& x, int64_t o, int64_t i, int64_t t) {
  return o * x.stride[0] + i * x.stride[1] + t * x.stride[2];
}

template <class T>
T gate(const Recurrence& p, int64_t o, int64_t i, int64_t t) {
  const T a = number<T>(p.a, offset(p.a, o, i, t), p.a.stride[3]);
  return p.log_space ? std::exp(a) : a;
}

template <class T>
T initial(const Recurrence& p, int64_t o, int64_t i) {
  if (!p.h0.data) return 0;
  return number<T>(p.h0, o * p.h0.stride[0] + i * p.h0.stride[1], p.h0.stride[2]);
}

template <class T>
void recur(const Recurrence& p, const Operand& h) {
  for_each_task(p.outer * p.inner, p.outer * p.inner * p.length, [&](int64_t task) {
    const int64_t o = task / p.inner, i = task % p.inner;
    const Steps steps{o, 0, p.length, p.reverse};
    T state = initial<T>(p, o, i);
    for (int64_t k = 0; k < p.length; ++k) {
      const int64_t t = steps.time(k);
      state = gate<T>(p, o, i, t) * state + number<T>(p.x, offset(p.x, o, i, t), p.x.stride[3]);
      put_number<T>(h, offset(h, o, i, t), h.stride[3], state);
    }
  });
}

template <class T>
void recur_backward(const Recurrence& p, const RecurrenceGradients& g) {
  for_each_task(p.outer * p.inner, p.outer * p.inner * p.length, [&](int64_t task) {
    const int64_t o = task / p.inner, i = task % p.inner;
    const Steps steps{o, 0, p.length, p.reverse};
    T carry = 0, da_sum = 0;
    for (int64_t k = p.length - 1; k >= 0; --k) {
      const int64_t t = steps.time(k);
      const T a = gate<T>(p, o, i, t);
      const T before = k ? number<T>(g.h, offset(g.h, o, i, steps.time(k - 1)), g.h.stride[3])
                         : initial<T>(p, o, i);
      const T gradient = number<T>(g.dh, offset(g.dh, o, i, t), g.dh.stride[3]) + carry;
      T da = gradient * conjugate(before);
      if (p.log_space) da *= conjugate(a);
      da_sum += da;
      if (!g.sum_da) put_number<T>(g.da, offset(g.da, o, i, t), g.da.stride[3], da);
      put_number<T>(g.dx, offset(g.dx, o, i, t), g.dx.stride[3], gradient);
      carry = conjugate(a) * gradient;
    }
    if (g.sum_da) put_number<T>(g.da, offset(g.da, o, i, 0), g.da.stride[3], da_sum);
    put_number<T>(g.dh0, o * g.dh0.stride[0] + i * g.dh0.stride[1], g.dh0.stride[2], carry);
  });
}

}  // namespace

void reference_selective_scan_forward(const SelectiveScan& p, const Operand& out,
                                      const Operand& last) {
  p.complex ? scan_forward<Complex>(p, out, last) : scan_forward<double>(p, out, last);
}

void reference_selective_scan_backward(const SelectiveScan& p, const SelectiveScanGradients& g) {
  p.complex ? scan_backward<Complex>(p, g) : scan_backward<double>(p, g);
}

void reference_state_update(const StateUpdate& p) {
  const int64_t work = p.batch * p.heads * p.head_dim * p.states;
  for_each_task(p.batch * p.heads, work, [&](int64_t task) {
    const int64_t b = task / p.heads, h = task % p.heads, group = h / (p.heads / p.groups);
    const int64_t row = p.rows.empty() ? b : p.rows[b];
    for (int64_t i = 0; i < p.head_dim; ++i) {
      if (row < 0) {
        put(p.out, 0, b, h, i);
        continue;
      }
      double dt = at(p.dt, b, h, i) + (p.dt_bias.data ? at(p.dt_bias, h, i) : 0);
      if (p.softplus) dt = softplus(dt);
      const double x = at(p.x, b, h, i);
      double y = p.d.data ? at(p.d, h, i) * x : 0;
      for (int64_t n = 0; n < p.states; ++n) {
        const double state = std::exp(dt * at(p.a, h, i, n)) * at(p.state, row, h, i, n) +
                             dt * x * at(p.b, b, group, n);
        y += at(p.c, b, group, n) * state;
        put(p.state, state, row, h, i, n);
      }
      put(p.out, p.z.data ? y * silu(at(p.z, b, h, i)) : y, b, h, i);
    }
  });
}

void reference_few_rows_linear(const FewRowsLinear& p, const Operand& out) {
  for_each_task(p.outputs, p.rows * p.outputs * p.inputs, [&](int64_t o) {
    for (int64_t r = 0; r < p.rows; ++r) {
      double sum = p.bias.data ? at(p.bias, o) : 0;
      for (int64_t i = 0; i < p.inputs; ++i) sum += at(p.x, r, i) * at(p.weight, o, i);
      put(out, sum, r, o);
    }
  });
}

void reference_recurrence_forward(const Recurrence& p, const Operand& h) {
  p.complex ? recur<Complex>(p, h) : recur<double>(p, h);
}

void reference_recurrence_backward(const Recurrence& p, const RecurrenceGradients& g) {
  p.complex ? recur_backward<Complex>(p, g) : recur_backward<double>(p, g);
}

}  // namespace pentad::scan
