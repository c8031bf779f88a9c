// SPDX-License-Identifier: Apache-2.0
// The definitions in matrix_scan.h, as loops.
#include "scan/matrix_scan.h"
#include "scan/scan_reference.h"

namespace pentad::scan {
namespace {

using Reals = std::vector<double>;

double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// x^T matrix, of [n][p].
void times_columns(const double* x, const double* matrix, int64_t keys, int64_t values,
                   double* out) {
  std::fill_n(out, values, 0.0);
  for (int64_t n = 0; n < keys; ++n)
    for (int64_t i = 0; i < values; ++i) out[i] += x[n] * matrix[n * values + i];
}

// What one step of one head reads, and u.
struct Token {
  Reals q, k, v, a, u, rest;  // a: of each key; rest: v, or with `delta` v - (a S)^T k; u = w rest
  double w = 1;

  Token(int64_t keys, int64_t values)
      : q(keys), k(keys), v(values), a(keys, 1.0), u(values), rest(values) {}

  // Multiplies the state [n][p] by the decays, then fills `rest` and u.
  void decay(bool delta, double* state) {
    const int64_t keys = k.size(), values = v.size();
    for (int64_t n = 0; n < keys; ++n)
      for (int64_t i = 0; i < values; ++i) state[n * values + i] *= a[n];
    if (delta) times_columns(k.data(), state, keys, values, rest.data());
    for (int64_t i = 0; i < values; ++i) {
      rest[i] = delta ? v[i] - rest[i] : v[i];
      u[i] = w * rest[i];
    }
  }
  void add(double* state) const {
    const int64_t keys = k.size(), values = v.size();
    for (int64_t n = 0; n < keys; ++n)
      for (int64_t i = 0; i < values; ++i) state[n * values + i] += k[n] * u[i];
  }
};

// --- One head of one sequence ----------------------------------------------------------------------

struct Head {
  const MatrixScan& p;
  const int64_t s, h, group;
  const Steps steps;

  Head(const MatrixScan& problem, int64_t sequence, int64_t head)
      : p(problem),
        s(sequence),
        h(head),
        group(head / (problem.heads / problem.groups)),
        steps(Steps::of(problem, sequence, problem.reverse)) {}

  int64_t size() const { return p.keys * p.values; }

  void read_state(const Operand& from, double* state) const {
    for (int64_t n = 0; n < p.keys; ++n)
      for (int64_t i = 0; i < p.values; ++i)
        state[n * p.values + i] = from.data ? at(from, s, h, n, i) : 0;
  }
  void put_state(const Operand& to, const double* state) const {
    for (int64_t n = 0; n < p.keys; ++n)
      for (int64_t i = 0; i < p.values; ++i) put(to, state[n * p.values + i], s, h, n, i);
  }
  void read(int64_t t, Token& token) const {
    for (int64_t n = 0; n < p.keys; ++n) {
      token.q[n] = at(p.q, steps.b, t, group, n);
      token.k[n] = at(p.k, steps.b, t, group, n);
      if (p.a.data) token.a[n] = at(p.a, steps.b, t, h, p.key_decay ? n : 0);
    }
    for (int64_t i = 0; i < p.values; ++i) token.v[i] = at(p.v, steps.b, t, h, i);
    if (p.w.data) token.w = at(p.w, steps.b, t, h);
  }
  void step(int64_t t, Token& token, double* state) const {
    read(t, token);
    token.decay(p.delta, state);
    token.add(state);
  }

  void forward(const Operand& out, const Operand& last) const {
    Reals state(size()), o(p.values);
    Token token(p.keys, p.values);
    read_state(p.initial, state.data());
    for (int64_t k = 0; k < steps.count; ++k) {
      const int64_t t = steps.time(k);
      step(t, token, state.data());
      times_columns(token.q.data(), state.data(), p.keys, p.values, o.data());
      for (int64_t i = 0; i < p.values; ++i) {
        const double skip = p.d.data ? at(p.d, h, i) * token.v[i] : 0;
        put(out, p.scale * o[i] + skip, steps.b, t, h, i);
      }
    }
    put_state(last, state.data());
  }
};

// --- Backward --------------------------------------------------------------------------------------

// The gradients of one head, which walks back from its last step. dq, dk: [k][n] of its group, and
// dd: [p], are added to.
struct HeadBackward {
  const Head& head;
  const MatrixScan& p;
  const MatrixScanGradients& g;
  Token token;
  Reals carry, down, dy, du;  // carry: a_{t+1} H_{t+1}, then G_t and H_t

  HeadBackward(const Head& of, const MatrixScanGradients& gradients)
      : head(of),
        p(of.p),
        g(gradients),
        token(of.p.keys, of.p.values),
        carry(of.size()),
        down(of.p.values),
        dy(of.p.values),
        du(of.p.values) {}

  void run(double* dq, double* dk, double* dd) {
    const int64_t size = head.size(), length = head.steps.count;
    // States before every kMatrixChunk-th step, and those of one chunk at a time.
    Reals starts((length / kMatrixChunk + 1) * size), states((kMatrixChunk + 1) * size);
    Reals state(size);
    head.read_state(p.initial, state.data());
    for (int64_t k = 0; k < length; ++k) {
      if (k % kMatrixChunk == 0) std::copy_n(state.data(), size, &starts[k / kMatrixChunk * size]);
      head.step(head.steps.time(k), token, state.data());
    }
    head.read_state(g.d_last, carry.data());
    for (int64_t end = length; end > 0;) {
      const int64_t begin = (end - 1) / kMatrixChunk * kMatrixChunk;
      std::copy_n(&starts[begin / kMatrixChunk * size], size, states.data());
      for (int64_t k = begin; k < end; ++k) {
        double* before = &states[(k - begin) * size];
        std::copy_n(before, size, before + size);
        head.step(head.steps.time(k), token, before + size);
      }
      for (int64_t k = end - 1; k >= begin; --k)
        step(head.steps.time(k), &states[(k - begin) * size], dq + k * p.keys, dk + k * p.keys, dd);
      end = begin;
    }
    head.put_state(g.dinitial, carry.data());
  }

 private:
  void step(int64_t t, const double* before, double* dq, double* dk, double* dd) {
    const int64_t b = head.steps.b, h = head.h, keys = p.keys, values = p.values;
    const double* after = before + head.size();
    head.read(t, token);
    Reals decayed(before, after);
    token.decay(p.delta, decayed.data());
    for (int64_t i = 0; i < values; ++i) {
      down[i] = g.d_out.data ? at(g.d_out, b, t, h, i) : 0;
      dd[i] += down[i] * token.v[i];
      dy[i] = p.scale * down[i];
    }
    for (int64_t n = 0; n < keys; ++n)
      for (int64_t i = 0; i < values; ++i) carry[n * values + i] += token.q[n] * dy[i];
    times_columns(token.k.data(), carry.data(), keys, values, du.data());
    put(g.dw, dot(du.data(), token.rest.data(), values), b, t, h);
    for (int64_t i = 0; i < values; ++i)
      put(g.dv, token.w * du[i] + (p.d.data ? at(p.d, h, i) * down[i] : 0), b, t, h, i);
    double da = 0;
    for (int64_t n = 0; n < keys; ++n) {
      double* row = &carry[n * values];
      dq[n] += dot(after + n * values, dy.data(), values);
      dk[n] += dot(row, token.u.data(), values);
      if (p.delta) {
        dk[n] -= token.w * dot(&decayed[n * values], du.data(), values);
        for (int64_t i = 0; i < values; ++i) row[i] -= token.k[n] * token.w * du[i];
      }
      const double here = dot(before + n * values, row, values);
      da += here;
      if (p.key_decay) put(g.da, here, b, t, h, n);
      for (int64_t i = 0; i < values; ++i) row[i] *= token.a[n];
    }
    if (!p.key_decay) put(g.da, da, b, t, h);
  }
};

}  // namespace

void reference_matrix_scan_forward(const MatrixScan& p, const Operand& out, const Operand& last) {
  const int64_t work = p.batch * p.length * p.heads * p.keys * p.values;
  for_each_task(p.sequences() * p.heads, work,
                [&](int64_t task) { Head(p, task / p.heads, task % p.heads).forward(out, last); });
}

void reference_matrix_scan_backward(const MatrixScan& p, const MatrixScanGradients& g) {
  const int64_t width = p.heads / p.groups, work = p.batch * p.length * p.heads * p.keys * p.values;
  std::vector<Reals> dd(p.sequences(), Reals(p.heads * p.values));
  for_each_task(p.sequences() * p.groups, work, [&](int64_t task) {
    const int64_t s = task / p.groups, group = task % p.groups;
    const Steps steps = Steps::of(p, s, p.reverse);
    Reals dq(steps.count * p.keys), dk(steps.count * p.keys);
    for (int64_t h = group * width; h < (group + 1) * width; ++h) {
      const Head head(p, s, h);
      HeadBackward(head, g).run(dq.data(), dk.data(), &dd[s][h * p.values]);
    }
    for (int64_t k = 0; k < steps.count; ++k)
      for (int64_t n = 0; n < p.keys; ++n) {
        put(g.dq, dq[k * p.keys + n], steps.b, steps.time(k), group, n);
        put(g.dk, dk[k * p.keys + n], steps.b, steps.time(k), group, n);
      }
  });
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.values; ++i) {
      double sum = 0;
      for (const Reals& part : dd) sum += part[h * p.values + i];
      put(g.dd, sum, h, i);
    }
}

void reference_matrix_update(const MatrixUpdate& p) {
  const int64_t work = p.batch * p.heads * p.keys * p.values;
  for_each_task(p.batch * p.heads, work, [&](int64_t task) {
    const int64_t b = task / p.heads, h = task % p.heads, group = h / (p.heads / p.groups);
    const int64_t row = p.rows.empty() ? b : p.rows[b];
    if (row < 0) {
      for (int64_t i = 0; i < p.values; ++i) put(p.out, 0, b, h, i);
      return;
    }
    Token token(p.keys, p.values);
    Reals state(p.keys * p.values), o(p.values);
    for (int64_t n = 0; n < p.keys; ++n) {
      token.q[n] = at(p.q, b, group, n);
      token.k[n] = at(p.k, b, group, n);
      if (p.a.data) token.a[n] = at(p.a, b, h, p.key_decay ? n : 0);
      for (int64_t i = 0; i < p.values; ++i) state[n * p.values + i] = at(p.state, row, h, n, i);
    }
    for (int64_t i = 0; i < p.values; ++i) token.v[i] = at(p.v, b, h, i);
    if (p.w.data) token.w = at(p.w, b, h);
    token.decay(p.delta, state.data());
    token.add(state.data());
    times_columns(token.q.data(), state.data(), p.keys, p.values, o.data());
    for (int64_t i = 0; i < p.values; ++i)
      put(p.out, p.scale * o[i] + (p.d.data ? at(p.d, h, i) * token.v[i] : 0), b, h, i);
    for (int64_t n = 0; n < p.keys; ++n)
      for (int64_t i = 0; i < p.values; ++i) put(p.state, state[n * p.values + i], row, h, n, i);
  });
}

}  // namespace pentad::scan
