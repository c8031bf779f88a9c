// SPDX-License-Identifier: Apache-2.0
// The definition of the causal convolution in scan.h, as loops.
#include "scan/scan_reference.h"

namespace pentad::scan {
namespace {

// One channel of one sequence. Step -1 is the one before the first.
struct Channel {
  const CausalConv& p;
  const int64_t s, d;
  const Steps steps;

  Channel(const CausalConv& problem, int64_t sequence, int64_t channel)
      : p(problem), s(sequence), d(channel), steps(Steps::of(problem, sequence)) {}

  int64_t before() const { return p.width - 1; }
  double x(int64_t i) const {
    if (i >= 0) return at(p.x, steps.b, d, steps.time(i));
    return p.initial.data ? at(p.initial, s, d, before() + i) : 0;
  }
  int32_t index(int64_t i) const {
    return p.seq_idx[steps.b * p.seq_idx_stride[0] + i * p.seq_idx_stride[1]];
  }
  bool padding(int64_t i) const { return p.seq_idx && index(i) < 0; }
  // Whether step i reads step j.
  bool reads(int64_t i, int64_t j) const {
    if (j < 0) return p.initial.data;
    return !p.seq_idx || index(i) == index(j);
  }
  double convolved(int64_t i) const {
    double sum = p.bias.data ? at(p.bias, d) : 0;
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t j = i - before() + k;
      if (reads(i, j)) sum += at(p.weight, d, k) * x(j);
    }
    return sum;
  }
};

// dweight [width] and dbias are added to.
void channel_backward(const Channel& channel, const CausalConvGradients& g, double* dweight,
                      double& dbias) {
  const CausalConv& p = channel.p;
  const Steps& steps = channel.steps;
  const int64_t d = channel.d, before = channel.before();
  std::vector<double> dx(before + steps.count);  // of `initial`, then of x
  if (g.d_final.data)
    for (int64_t i = 0; i < before; ++i) dx[steps.count + i] += at(g.d_final, channel.s, d, i);
  for (int64_t i = 0; i < steps.count; ++i) {
    if (channel.padding(i)) continue;
    double dp = at(g.d_out, steps.b, d, steps.time(i));
    if (p.silu) dp *= silu_slope(channel.convolved(i));
    dbias += dp;
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t j = i - before + k;
      if (!channel.reads(i, j)) continue;
      dweight[k] += dp * channel.x(j);
      dx[before + j] += dp * at(p.weight, d, k);
    }
  }
  for (int64_t i = 0; i < before; ++i) put(g.dinitial, dx[i], channel.s, d, i);
  for (int64_t i = 0; i < steps.count; ++i) put(g.dx, dx[before + i], steps.b, d, steps.time(i));
}

// Further steps of channel d of sequence b.
void channel_update(const ConvUpdate& update, int64_t b, int64_t d) {
  const CausalConv& p = update.conv;
  const int64_t row = update.rows.empty() ? b : update.rows[b];
  if (row < 0) {
    for (int64_t t = 0; t < p.length; ++t) put(update.out, 0, b, d, t);
    return;
  }
  const int64_t size = update.state_length, before = p.width - 1;
  // Where the cache has input i, of which 0 is the first new one.
  const auto slot = [&](int64_t i) {
    if (update.positions.empty()) return size + i;
    return ((update.positions[b] + i) % size + size) % size;
  };
  std::vector<double> inputs(before + p.length);
  for (int64_t i = -before; i < 0; ++i) inputs[before + i] = at(update.state, row, d, slot(i));
  for (int64_t t = 0; t < p.length; ++t) inputs[before + t] = at(p.x, b, d, t);
  for (int64_t t = 0; t < p.length; ++t) {
    double sum = p.bias.data ? at(p.bias, d) : 0;
    for (int64_t k = 0; k < p.width; ++k) sum += at(p.weight, d, k) * inputs[t + k];
    put(update.out, p.silu ? silu(sum) : sum, b, d, t);
  }
  if (update.positions.empty())
    for (int64_t i = 0; i + p.length < size; ++i)
      put(update.state, at(update.state, row, d, i + p.length), row, d, i);
  const int64_t kept = std::min(p.length, size);
  for (int64_t t = p.length - kept; t < p.length; ++t)
    put(update.state, inputs[before + t], row, d,
        update.positions.empty() ? size - p.length + t : slot(t));
}

}  // namespace

void reference_causal_conv_forward(const CausalConv& p, const Operand& out, const Operand& final) {
  for_each_task(p.sequences() * p.dim, p.batch * p.dim * p.length * p.width, [&](int64_t task) {
    const Channel channel(p, task / p.dim, task % p.dim);
    for (int64_t i = 0; i < channel.steps.count; ++i) {
      const double sum = channel.padding(i) ? 0 : channel.convolved(i);
      put(out, p.silu ? silu(sum) : sum, channel.steps.b, channel.d, channel.steps.time(i));
    }
    for (int64_t i = 0; i < p.width - 1; ++i)
      put(final, channel.x(channel.steps.count - (p.width - 1) + i), channel.s, channel.d, i);
  });
}

void reference_causal_conv_backward(const CausalConv& p, const CausalConvGradients& g) {
  for_each_task(p.dim, p.batch * p.dim * p.length * p.width, [&](int64_t d) {
    std::vector<double> dweight(p.width);
    double dbias = 0;
    for (int64_t s = 0; s < p.sequences(); ++s)
      channel_backward(Channel(p, s, d), g, dweight.data(), dbias);
    for (int64_t k = 0; k < p.width; ++k) put(g.dweight, dweight[k], d, k);
    put(g.dbias, dbias, d);
  });
}

void reference_causal_conv_update(const ConvUpdate& p) {
  for_each_task(p.conv.batch * p.conv.dim, p.conv.batch * p.conv.dim * p.conv.length * p.conv.width,
                [&](int64_t task) { channel_update(p, task / p.conv.dim, task % p.conv.dim); });
}

}  // namespace pentad::scan
