// SPDX-License-Identifier: Apache-2.0
// Cuts the selective scan into jobs: a sequence, and some channels of one group. Every channel's
// recurrence is its own, so the forward pass may be cut anywhere. The backward pass sums over
// channels (dB, dC) and over sequences (dA, dD, ...): its pieces depend on the shapes alone, and are
// added in order.
#include <algorithm>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/operands.h"
#include "scan/scan.h"
#include "scan/scan_drive.h"

namespace pentad::scan {
namespace {

constexpr int64_t kShare = 128;        // channels of a backward job: dB, dC of one cost 1/128 of h
constexpr int64_t kSequenceParts = 8;  // most pieces of the batch in the backward pass

Strided steps_of(const SelectiveScan& p, const Operand& x, const Sequence& q, int64_t channel) {
  const int64_t first = q.batch * x.stride[0] + channel * x.stride[1] + q.first * x.stride[2];
  return {moved(x, first), x.dtype, x.stride[1], p.reverse ? -x.stride[2] : x.stride[2]};
}

// (d, n, part) from `channel` on, at x + offset.
States states_of(const Operand& x, int64_t offset, int64_t channel, int axis = 0) {
  const int64_t* stride = x.stride + axis;
  return {moved(x, offset + channel * stride[0]), x.dtype, stride[0], stride[1], stride[2], 0};
}

// (b, g, n, t, part) of one group and sequence.
States group_of(const SelectiveScan& p, const Operand& x, const Sequence& q, int64_t group) {
  const int64_t first = q.batch * x.stride[0] + group * x.stride[1] + q.first * x.stride[3];
  return {moved(x, first), x.dtype,     0,
          x.stride[2],     x.stride[4], p.reverse ? -x.stride[3] : x.stride[3]};
}

SelectiveJob job_of(const SelectiveScan& p, int64_t s, int64_t group, int64_t channel,
                    int64_t channels, const float* stored, float* scratch) {
  const Sequence q = sequence(p, s, kChunk);
  SelectiveJob job = {};
  job.channels = channels;
  job.steps = q.steps;
  job.states = p.states;
  job.complex = p.complex;
  job.softplus = p.softplus;
  job.constant_b = p.constant_b;
  job.constant_c = p.constant_c;
  job.u = steps_of(p, p.u, q, channel);
  job.delta = steps_of(p, p.delta, q, channel);
  job.z = steps_of(p, p.z, q, channel);
  job.a = states_of(p.a, 0, channel);
  job.b = p.constant_b ? states_of(p.b, 0, channel) : group_of(p, p.b, q, group);
  job.c = p.constant_c ? states_of(p.c, 0, channel) : group_of(p, p.c, q, group);
  job.d = static_cast<const float*>(moved(p.d, channel * p.d.stride[0]));
  job.bias = static_cast<const float*>(moved(p.delta_bias, channel * p.delta_bias.stride[0]));
  job.d_step = p.d.stride[0];
  job.bias_step = p.delta_bias.stride[0];
  job.initial = states_of(p.initial, s * p.initial.stride[0], channel, 1);
  job.stored = const_cast<float*>(stored);
  if (stored) job.stored += q.chunk * p.states * p.parts() * p.dim + channel;
  job.all_channels = p.dim;
  job.scratch = scratch;
  return job;
}

// Channels [begin, end) of one group.
struct Share {
  int64_t group, begin, end;
};
std::vector<Share> shares(const SelectiveScan& p, int64_t size) {
  std::vector<Share> all;
  const int64_t per_group = p.groups ? p.dim / p.groups : 0;
  for (int64_t g = 0; per_group && g < p.groups; ++g)
    for (int64_t c = 0; c < per_group; c += size)
      all.push_back({g, g * per_group + c, g * per_group + std::min(c + size, per_group)});
  return all;
}

int64_t state_steps(const SelectiveScan& p) {
  return p.batch * p.dim * p.length * p.states * p.parts();
}

}  // namespace

void selective_scan_forward(const SelectiveScan& p, const Operand& out, const Operand& last,
                            float* stored) {
  if (p.u.dtype == DType::f64) return reference_selective_scan_forward(p, out, last);
  const int64_t width = p.states * p.parts(), lanes = kernels().lanes;
  // Enough jobs for the threads, in whole vectors, and not so narrow that packing B and C shows.
  int64_t size = kShare;
  while (size > lanes && p.sequences() * ceil_div(p.dim, size) < 3 * num_threads()) size /= 2;
  const std::vector<Share> cuts = shares(p, size);
  for_tasks(state_steps(p), p.sequences() * int64_t(cuts.size()), [&](int64_t i) {
    const int64_t s = i / int64_t(cuts.size());
    const Share& share = cuts[i % cuts.size()];
    const int64_t channels = share.end - share.begin;
    Scratch<float> scratch(selective_scratch(channels, width));
    SelectiveForwardJob job = {};
    job.scan = job_of(p, s, share.group, share.begin, channels, stored, scratch.get());
    job.out = steps_of(p, out, sequence(p, s, kChunk), share.begin);
    job.last = states_of(last, s * last.stride[0], share.begin, 1);
    kernels().selective_forward(job);
  });
}

void selective_scan_backward(const SelectiveScan& p, const SelectiveScanGradients& g) {
  if (p.u.dtype == DType::f64) return reference_selective_scan_backward(p, g);
  const int64_t width = p.states * p.parts(), lanes = kernels().lanes;
  const std::vector<Share> cuts = shares(p, kShare);
  const int64_t share_count = int64_t(cuts.size());
  const int64_t per_group = p.groups ? share_count / p.groups : 0;
  const int64_t sequences = p.sequences(), pieces = std::min(sequences, kSequenceParts);

  // dB and dC of each share of a group, [share][b][g][t][n][part], where there are several.
  const int64_t rows = p.batch * p.groups * p.length * width;
  const bool apart = per_group != 1;  // 0 without channels: sums of nothing
  Scratch<float> db_parts(apart && g.db.data && !p.constant_b ? per_group * rows : 0);
  Scratch<float> dc_parts(apart && g.dc.data && !p.constant_c ? per_group * rows : 0);
  const auto target = [&](const Operand& x, bool constant, float* parts, const Share& share,
                          int64_t index, int64_t s) -> States {
    if (!x.data || constant) return {};
    if (!apart) return group_of(p, x, sequence(p, s, kChunk), share.group);
    const int64_t time = width, group = p.length * time, batch = p.groups * group;
    const Operand part = {
        parts + index % per_group * rows, DType::f32, {batch, group, p.parts(), time, 1}};
    return group_of(p, part, sequence(p, s, kChunk), share.group);
  };

  // What is summed over time: [piece][share][block of lanes][SelectiveSums].
  const SelectiveSums layout = selective_sums(width, p.constant_b, p.constant_c);
  const int64_t share_sums = padded_channels(kShare, lanes) * layout.size;
  Scratch<float> sums(pieces * share_count * share_sums);
  std::fill_n(sums.get(), pieces * share_count * share_sums, 0.0f);

  for_tasks(state_steps(p), pieces * share_count, [&](int64_t i) {
    const int64_t piece = i / share_count, index = i % share_count;
    const Share& share = cuts[index];
    const int64_t channels = share.end - share.begin;
    Scratch<float> scratch(selective_scratch(channels, width));
    for (int64_t s = sequences * piece / pieces; s < sequences * (piece + 1) / pieces; ++s) {
      const Sequence q = sequence(p, s, kChunk);
      SelectiveBackwardJob job = {};
      job.scan = job_of(p, s, share.group, share.begin, channels, g.stored, scratch.get());
      job.d_out = steps_of(p, g.d_out, q, share.begin);
      job.du = steps_of(p, g.du, q, share.begin);
      job.ddelta = steps_of(p, g.ddelta, q, share.begin);
      job.dz = steps_of(p, g.dz, q, share.begin);
      job.d_last = states_of(g.d_last, s * g.d_last.stride[0], share.begin, 1);
      job.dinitial = states_of(g.dinitial, s * g.dinitial.stride[0], share.begin, 1);
      job.db = target(g.db, p.constant_b, db_parts.get(), share, index, s);
      job.dc = target(g.dc, p.constant_c, dc_parts.get(), share, index, s);
      job.sums = sums.get() + i * share_sums;
      kernels().selective_backward(job);
    }
  });

  // The pieces in order.
  for_tasks(share_count * share_sums * pieces, share_count, [&](int64_t index) {
    const Share& share = cuts[index];
    const auto total = [&](int64_t channel, int64_t vector) {
      const int64_t c = channel - share.begin;
      const int64_t at = (c / lanes * layout.size + vector) * lanes + c % lanes;
      float sum = 0.0f;
      for (int64_t piece = 0; piece < pieces; ++piece)
        sum += sums.get()[(piece * share_count + index) * share_sums + at];
      return sum;
    };
    const auto write = [&](const Operand& x, int64_t first) {
      if (!x.data) return;
      for (int64_t c = share.begin; c < share.end; ++c)
        for (int64_t k = 0; k < width; ++k)
          static_cast<float*>(
              x.data)[c * x.stride[0] + k / p.parts() * x.stride[1] + k % p.parts() * x.stride[2]] =
              total(c, first + k);
    };
    write(g.da, 0);
    if (p.constant_b) write(g.db, layout.db);
    if (p.constant_c) write(g.dc, layout.dc);
    for (int64_t c = share.begin; c < share.end; ++c) {
      if (g.dd.data) static_cast<float*>(g.dd.data)[c * g.dd.stride[0]] = total(c, layout.dd);
      if (g.ddelta_bias.data)
        static_cast<float*>(g.ddelta_bias.data)[c * g.ddelta_bias.stride[0]] =
            total(c, layout.dbias);
    }
  });
  const auto add_shares = [&](const Operand& x, bool constant, const float* parts) {
    if (!x.data || constant || !apart) return;
    for_tasks(rows * per_group, p.batch * p.groups * ceil_div(p.length, kChunk), [&](int64_t i) {
      const int64_t chunks = ceil_div(p.length, kChunk), bg = i / chunks;
      const int64_t first = i % chunks * kChunk, end = std::min(first + kChunk, p.length);
      float* out =
          static_cast<float*>(x.data) + bg / p.groups * x.stride[0] + bg % p.groups * x.stride[1];
      for (int64_t t = first; t < end; ++t)
        for (int64_t k = 0; k < width; ++k) {
          float sum = 0.0f;
          for (int64_t share = 0; share < per_group; ++share)
            sum += parts[share * rows + (bg * p.length + t) * width + k];
          out[t * x.stride[3] + k / p.parts() * x.stride[2] + k % p.parts() * x.stride[4]] = sum;
        }
    });
  };
  add_shares(g.db, p.constant_b, db_parts.get());
  add_shares(g.dc, p.constant_c, dc_parts.get());
}

}  // namespace pentad::scan
