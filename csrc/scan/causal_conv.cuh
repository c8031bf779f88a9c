// SPDX-License-Identifier: Apache-2.0
// What the kernels of the causal convolution share: the problem as a device sees it, and the inputs
// that a step's taps find.
#pragma once
#include "scan/scan_elements.cuh"

namespace pentad::scan::cuda {

struct Conv {
  int64_t batch, dim, length;
  int width;
  bool silu;
  Operand x, weight, bias, initial;
  const int32_t* seq_idx;
  int64_t seq_idx_stride[2];
  Indices begin;

  Conv(const CausalConv& p, const Indices& boundaries)
      : batch(p.batch),
        dim(p.dim),
        length(p.length),
        width(static_cast<int>(p.width)),
        silu(p.silu),
        x(p.x),
        weight(p.weight),
        bias(p.bias),
        initial(p.initial),
        seq_idx(p.seq_idx),
        seq_idx_stride{p.seq_idx_stride[0], p.seq_idx_stride[1]},
        begin(boundaries) {}

  __device__ int32_t index(int64_t b, int64_t t) const {
    return seq_idx[b * seq_idx_stride[0] + t * seq_idx_stride[1]];
  }
  __device__ float tap(int64_t d, int k) const {
    return read(weight.data, weight.dtype, d * weight.stride[0] + k * weight.stride[1]);
  }
  __device__ float bias_of(int64_t d) const {
    return bias.data ? read(bias.data, bias.dtype, d * bias.stride[0]) : 0.0f;
  }
  // What tap k of step t reads, or 0 where it does not count. `at` has step t.
  __device__ float input(const Sequence& at, int64_t b, int64_t d, int64_t t, int k) const {
    const int64_t from = t - (width - 1) + k;
    if (from < at.first) {
      if (!initial.data) return 0.0f;
      const int64_t i = width - 1 + from - at.first;
      return read(initial.data, initial.dtype,
                  at.s * initial.stride[0] + d * initial.stride[1] + i * initial.stride[2]);
    }
    if (seq_idx && index(b, from) != index(b, t)) return 0.0f;
    return read(x.data, x.dtype, b * x.stride[0] + d * x.stride[1] + from * x.stride[2]);
  }
  // Tap by tap.
  __device__ float convolved(const Sequence& at, int64_t b, int64_t d, int64_t t) const {
    float sum = bias_of(d);
    for (int k = 0; k < width; ++k) sum = fmaf(tap(d, k), input(at, b, d, t, k), sum);
    return sum;
  }
  __device__ bool padding(int64_t b, int64_t t) const { return seq_idx && index(b, t) < 0; }
};

}  // namespace pentad::scan::cuda
