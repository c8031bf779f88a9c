// SPDX-License-Identifier: Apache-2.0
// The causal convolution, forward: a lane computes four neighbouring steps of one channel from pieces
// of four inputs, which its neighbours read too and the caches hold. Neighbouring lanes take what
// lies next to each other in memory, pieces of time or channels.
#include "scan/causal_conv.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kConvLanes = 128;

struct ConvTask {
  Conv conv;
  Operand out;
  bool by_time;             // lanes of a warp lie along time; else along channels
  bool x_fours, out_fours;  // pieces of x, out are one access
  int64_t pieces;           // ceil(length / 4)
};

// x (b, d, t), weight (d, k), bias (d) -> out (b, d, t).
// Limit: memory, x and out; for wide convolutions the accesses to cached pieces, one per 16
// multiply-adds.
template <class T>
__global__ void __launch_bounds__(kConvLanes) conv_forward_kernel(ConvTask task) {
  const Conv& p = task.conv;
  int64_t lane = int64_t{blockIdx.x} * kConvLanes + threadIdx.x;
  if (lane >= p.batch * p.dim * task.pieces) return;
  const int64_t piece = task.by_time ? lane % task.pieces : lane / p.dim % task.pieces;
  const int64_t d = task.by_time ? lane / task.pieces % p.dim : lane % p.dim;
  const int64_t b = lane / p.dim / task.pieces, t = piece * 4;
  const int steps = static_cast<int>(min(int64_t{4}, p.length - t));
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + d * p.x.stride[1];
  const Sequence at = sequence_at(p.begin, b, t, p.length);
  const float bias = p.bias_of(d);
  float sums[4] = {bias, bias, bias, bias};
  // Taps in groups of four, the first of them padded with zeros.
  const int groups = (p.width + 3) / 4;
  const bool inside = t - groups * 4 >= at.first && t + 4 <= at.first + at.steps;
  if (inside && !p.seq_idx) {
    const auto inputs = [&](int64_t from, float (&v)[4]) {
      if (task.x_fours) return read_four(x + from, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = to_float(x[(from + j) * p.x.stride[2]]);
    };
    float window[8], next[4];
    inputs(t - groups * 4, next);
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int j = 0; j < 4; ++j) window[j] = next[j];
      inputs(t - (groups - 1 - g) * 4, next);
#pragma unroll
      for (int j = 0; j < 4; ++j) window[4 + j] = next[j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = p.width - 4 * (groups - g) + i;
        const float weight = k >= 0 ? p.tap(d, k) : 0.0f;
        // Tap k of step t + j is at window[1 + i + j].
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (k >= 0) sums[j] = fmaf(weight, window[1 + i + j], sums[j]);
      }
    }
  } else {
    for (int j = 0; j < steps; ++j) {
      const Sequence there = sequence_at(p.begin, b, t + j, p.length);
      const float sum = p.padding(b, t + j) ? 0.0f : p.convolved(there, b, d, t + j);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i == j) sums[i] = sum;
    }
  }
  if (p.silu) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = silu(sums[j]);
  }
  T* out = static_cast<T*>(task.out.data) + b * task.out.stride[0] + d * task.out.stride[1];
  if (task.out_fours && steps == 4) return write_four(out + t, sums);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < steps) from_float(sums[j], out[(t + j) * task.out.stride[2]]);
}

// The last inputs of each sequence: final (s, d, width - 1).
// Limit: memory.
__global__ void __launch_bounds__(kConvLanes)
    conv_final_kernel(Conv p, Operand final, int64_t sequences) {
  const int64_t before = p.width - 1, lane = int64_t{blockIdx.x} * kConvLanes + threadIdx.x;
  if (lane >= sequences * p.dim * before) return;
  const int64_t i = lane % before, d = lane / before % p.dim, s = lane / before / p.dim;
  const Sequence at = sequence_of(p.begin, s, p.length);
  const int64_t t = at.steps - before + i;  // of the sequence
  float value = 0.0f;
  if (t >= 0)
    value = read(p.x.data, p.x.dtype,
                 at.b * p.x.stride[0] + d * p.x.stride[1] + (at.first + t) * p.x.stride[2]);
  else if (p.initial.data)
    value = read(
        p.initial.data, p.initial.dtype,
        s * p.initial.stride[0] + d * p.initial.stride[1] + (before + t) * p.initial.stride[2]);
  write(final.data, final.dtype, s * final.stride[0] + d * final.stride[1] + i * final.stride[2],
        value);
}

}  // namespace

void causal_conv_forward(const CudaStream& stream, const CausalConv& p, const Indices& begin,
                         const Operand& out, const Operand& final) {
  const Conv conv(p, begin);
  const int64_t pieces = ceil_div(p.length, 4), lanes = p.batch * p.dim * pieces;
  if (lanes) {
    const ConvTask task = {
        conv,  out, p.x.stride[2] == 1 || p.dim < 16, in_fours(p.x, 3, 2), in_fours(out, 3, 2),
        pieces};
    for_type(p.x.dtype, [&](auto type) {
      launch(stream, "scan: causal_conv1d", conv_forward_kernel<decltype(type)>,
             {blocks_of(ceil_div(lanes, kConvLanes)), kConvLanes}, task);
    });
  }
  const int64_t sequences = sequences_of(begin, p.batch),
                states = sequences * p.dim * (p.width - 1);
  if (final.data && states)
    launch(stream, "scan: causal_conv1d final states", conv_final_kernel,
           {blocks_of(ceil_div(states, kConvLanes)), kConvLanes}, conv, final, sequences);
}

}  // namespace pentad::scan::cuda
