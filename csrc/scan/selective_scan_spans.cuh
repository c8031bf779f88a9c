// SPDX-License-Identifier: Apache-2.0
// Spans of time that run side by side. Each span's last state from zero, and the sum of its steps
// dt, give the states that all spans begin with:
//
//   h at the end = exp(A sum dt) h at the beginning + h at the end from zero
//
// one after the other but without the steps between. Backward the same holds for the gradients of
// states, from the last span to the first.
#pragma once
#include "scan/selective_scan.cuh"

namespace pentad::scan::cuda {

struct SpanStates {
  float* ends;   // [sequence][span][n][part][d]: what a span gives, then what it begins with
  double* sums;  // [sequence][span][d]: of dt

  SpanStates(ScratchCuts& cuts, int64_t sequences, int64_t spans, int64_t width, int64_t dim)
      : ends(spans > 1 ? cuts.take<float>(sequences * spans * width * dim) : nullptr),
        sums(spans > 1 ? cuts.take<double>(sequences * spans * dim) : nullptr) {}
  __device__ float* of(const Scan& p, int64_t s, int64_t span) const {
    return ends + (s * p.spans + span) * p.width() * p.dim;
  }
};

__device__ inline Real decay_over(double sum, Real a) {
  return {expf(static_cast<float>(sum * a.re))};
}
// The turn in double: it can be many times round.
__device__ inline Complex decay_over(double sum, Complex a) {
  const float size = expf(static_cast<float>(sum * a.re));
  const double turn = sum * a.im;
  return {size * static_cast<float>(cos(turn)), size * static_cast<float>(sin(turn))};
}

// ends (s, span, n, part, d) -> the same, states at the beginnings; `against`: from the last span to
// the first. `first`: (s, d, n, part), what the first begins with, or absent.
// Limit: latency, two loads per span.
template <class N>
__global__ void __launch_bounds__(kScanLanes)
    join_spans(Scan p, SpanStates spans, Operand first, bool against) {
  const int64_t lane = int64_t{blockIdx.x} * kScanLanes + threadIdx.x;
  if (lane >= p.sequences * p.states * p.dim) return;
  const int64_t d = lane % p.dim, n = lane / p.dim % p.states, s = lane / p.dim / p.states;
  const N a =
      read_number<N>(p.a.data, DType::f32, d * p.a.stride[0] + n * p.a.stride[1], p.a.stride[2]);
  N h{};
  if (first.data)
    h = read_number<N>(first.data, DType::f32,
                       s * first.stride[0] + d * first.stride[1] + n * first.stride[2],
                       first.stride[3]);
  const int64_t place = n * p.parts() * p.dim + d;
  for (int64_t i = 0; i < p.spans; ++i) {
    const int64_t span = against ? p.spans - 1 - i : i;
    float* at = spans.of(p, s, span);
    const N end = read_number<N>(at, DType::f32, place, p.dim);
    write_number(at, DType::f32, place, p.dim, h);
    N decay = decay_over(spans.sums[(s * p.spans + span) * p.dim + d], a);
    if (against) decay = conj(decay);
    h = multiply_add(decay, h, end);
  }
}

template <class N>
void launch_join(const CudaStream& stream, const Scan& p, const SpanStates& spans,
                 const Operand& first, bool against, N) {
  launch(stream, "scan: selective_scan spans", join_spans<N>,
         {blocks_of(ceil_div(p.sequences * p.states * p.dim, kScanLanes)), kScanLanes}, p, spans,
         first, against);
}

}  // namespace pentad::scan::cuda
