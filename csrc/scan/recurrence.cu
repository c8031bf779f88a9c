// SPDX-License-Identifier: Apache-2.0
// The elementwise recurrence h_t = a_t h_{t-1} + x_t. A step is a map h -> a h + b, and maps compose:
// (a2, b2) after (a1, b1) is (a2 a1, a2 b1 + b2), so that time can be cut anywhere and put together
// again. Where time is what lies next to each other in memory, the lanes of a block take neighbouring
// steps of one channel; else each lane walks along a channel of its own.
//
// The backward pass is the same in the other direction: with c_t = conj(a_t) (dh_t + c_{t+1}), the
// gradient of h_t is dh_t + c_{t+1}.
#include "scan/scan_elements.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kRecurrenceLanes = 128;
constexpr int kRecurrenceWarps = kRecurrenceLanes / 32;
constexpr int kLaneSteps = 4;  // of a lane at a time
constexpr int kBlockSteps = kRecurrenceLanes * kLaneSteps;

template <class N>
struct Map {
  N a, b;
};
// a h + b, where a product of many gates that overflowed does not turn h = 0 into NaN.
template <class N>
__device__ N apply(const Map<N>& map, N h) {
  return is_zero(h) ? map.b : multiply_add(map.a, h, map.b);
}
template <class N>
__device__ Map<N> then(const Map<N>& first, const Map<N>& second) {
  return {second.a * first.a, apply(second, first.b)};
}
__device__ inline Real shuffled_up(Real x, int by) { return {__shfl_up_sync(kFullWarp, x.re, by)}; }
__device__ inline Complex shuffled_up(Complex x, int by) {
  return {__shfl_up_sync(kFullWarp, x.re, by), __shfl_up_sync(kFullWarp, x.im, by)};
}

__device__ inline bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
__device__ inline bool is_finite(Real x) { return is_finite(x.re); }
__device__ inline bool is_finite(Complex x) { return is_finite(x.re) && is_finite(x.im); }

// What lanes leave for each other.
template <class N>
struct LaneTotals {
  Map<N> warps[kRecurrenceWarps];
  N state;
};

// What comes before this lane's steps: `h` through the maps of all lanes below it. On return `h` has
// gone through all of the block's. walk(h) goes through this lane's steps one by one: where gates
// above one multiply to infinity, the lanes take turns.
template <class N, class F>
__device__ N before_lane(Map<N> map, N& h, LaneTotals<N>* totals, const F& walk) {
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const Map<N> below = {shuffled_up(map.a, by), shuffled_up(map.b, by)};
    if (lane >= by) map = then(below, map);
  }
  if (__syncthreads_or(!is_finite(map.a))) {
    N mine{};
    if (threadIdx.x == 0) totals->state = h;
    for (int turn = 0; turn < kRecurrenceLanes; ++turn) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) != turn) continue;
      mine = totals->state;
      totals->state = walk(mine);
    }
    __syncthreads();
    h = totals->state;
    return mine;
  }
  if (lane == 31) totals->warps[warp] = map;
  const Map<N> below = {shuffled_up(map.a, 1), shuffled_up(map.b, 1)};
  __syncthreads();
  N mine{};
#pragma unroll
  for (int w = 0; w < kRecurrenceWarps; ++w) {
    if (w == warp) mine = lane ? apply(below, h) : h;
    h = apply(totals->warps[w], h);
  }
  return mine;
}

// Step k of the walk is at time t(k): forward passes walk with the recurrence, backward ones against
// it.
struct Walk {
  int64_t length;
  bool down;
  __device__ int64_t time(int64_t k) const { return down ? length - 1 - k : k; }
};

// One channel's elements.
template <class N>
struct Track {
  void* data;
  DType dtype;
  int64_t base, time, part;

  __device__ Track(const Operand& x, int64_t outer, int64_t inner, int axis = 2)
      : data(x.data),
        dtype(x.dtype),
        base(outer * x.stride[0] + inner * x.stride[1]),
        time(axis == 3 ? 0 : x.stride[2]),
        part(x.stride[axis == 3 ? 2 : 3]) {}
  __device__ N at(int64_t t) const { return read_number<N>(data, dtype, base + t * time, part); }
  __device__ void put(int64_t t, N x) const { write_number(data, dtype, base + t * time, part, x); }
};

template <class N>
__device__ N gate(const Recurrence& p, const Track<N>& a, int64_t t) {
  return p.log_space ? exp_of(a.at(t)) : a.at(t);
}
template <class N>
__device__ N state_before(const Recurrence& p, int64_t o, int64_t i) {
  return p.h0.data ? Track<N>(p.h0, o, i, 3).at(0) : N{};
}

// Four steps k, k + 1, ... of the walk from memory at once, where that is possible.
template <class N>
struct Steps {
  N at[kLaneSteps];
};
template <class N>
__device__ Steps<N> read_steps(const Track<N>& x, const Walk& walk, int64_t k, bool fours) {
  Steps<N> steps{};
  if constexpr (N::kParts == 1) {
    if (fours && k + kLaneSteps <= walk.length) {
      const int64_t first = walk.down ? walk.time(k + kLaneSteps - 1) : k;
      float v[4];
      if (x.dtype == DType::bf16)
        read_four(static_cast<const __nv_bfloat16*>(x.data) + x.base + first, v);
      else if (x.dtype == DType::f16)
        read_four(static_cast<const __half*>(x.data) + x.base + first, v);
      else read_four(static_cast<const float*>(x.data) + x.base + first, v);
#pragma unroll
      for (int j = 0; j < kLaneSteps; ++j) steps.at[j].re = walk.down ? v[3 - j] : v[j];
      return steps;
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneSteps; ++j)
    if (k + j < walk.length) steps.at[j] = x.at(walk.time(k + j));
  return steps;
}
template <class N>
__device__ void write_steps(const Track<N>& x, const Walk& walk, int64_t k, bool fours,
                            const Steps<N>& steps) {
  if constexpr (N::kParts == 1) {
    if (fours && k + kLaneSteps <= walk.length) {
      const int64_t first = walk.down ? walk.time(k + kLaneSteps - 1) : k;
      float v[4];
#pragma unroll
      for (int j = 0; j < kLaneSteps; ++j) v[j] = walk.down ? steps.at[3 - j].re : steps.at[j].re;
      if (x.dtype == DType::bf16)
        write_four(static_cast<__nv_bfloat16*>(x.data) + x.base + first, v);
      else if (x.dtype == DType::f16) write_four(static_cast<__half*>(x.data) + x.base + first, v);
      else write_four(static_cast<float*>(x.data) + x.base + first, v);
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneSteps; ++j)
    if (k + j < walk.length) x.put(walk.time(k + j), steps.at[j]);
}

// Bits: which arrays may be read and written four steps at a time. A walk that goes down meets its
// groups of four at multiples of four only where the length is one.
enum Fours : uint32_t { kA = 1, kX = 2, kH = 4, kDh = 8, kDa = 16, kDx = 32 };

// --- Forward ----------------------------------------------------------------------------------------

// a, x (o, i, t) -> h (o, i, t); one block per channel, its lanes along time.
// Limit: memory, 12 bytes per float element.
template <class N>
__global__ void __launch_bounds__(kRecurrenceLanes)
    recurrence_along(Recurrence p, Operand out, uint32_t fours) {
  const int64_t o = blockIdx.x / p.inner, i = blockIdx.x % p.inner;
  const Walk walk{p.length, p.reverse};
  const Track<N> a(p.a, o, i), x(p.x, o, i), to(out, o, i);
  Shared shared;
  auto* totals = shared.take<LaneTotals<N>>(1);
  N h = state_before<N>(p, o, i);
  for (int64_t first = 0; first < p.length; first += kBlockSteps) {
    const int64_t k = first + threadIdx.x * kLaneSteps;
    Steps<N> gates = read_steps(a, walk, k, fours & kA);
    Steps<N> inputs = read_steps(x, walk, k, fours & kX);
    Map<N> all = {number(1.0f, 0.0f, N{}), N{}};
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j) {
      if (k + j >= p.length) gates.at[j] = number(1.0f, 0.0f, N{});
      else if (p.log_space) gates.at[j] = exp_of(gates.at[j]);
      all = then(all, Map<N>{gates.at[j], inputs.at[j]});
    }
    N state = before_lane(all, h, totals, [&](N from) {
#pragma unroll
      for (int j = 0; j < kLaneSteps; ++j) from = multiply_add(gates.at[j], from, inputs.at[j]);
      return from;
    });
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j)
      inputs.at[j] = state = multiply_add(gates.at[j], state, inputs.at[j]);
    write_steps(to, walk, k, fours & kH, inputs);
  }
}

// The same; one lane per channel.
template <class N>
__global__ void __launch_bounds__(kRecurrenceLanes) recurrence_across(Recurrence p, Operand out) {
  const int64_t channel = int64_t{blockIdx.x} * kRecurrenceLanes + threadIdx.x;
  if (channel >= p.outer * p.inner) return;
  const int64_t o = channel / p.inner, i = channel % p.inner;
  const Walk walk{p.length, p.reverse};
  const Track<N> a(p.a, o, i), x(p.x, o, i), to(out, o, i);
  N h = state_before<N>(p, o, i);
  for (int64_t k = 0; k < p.length; k += kLaneSteps) {
    const Steps<N> gates = read_steps(a, walk, k, false), inputs = read_steps(x, walk, k, false);
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j)
      if (k + j < p.length) {
        h = multiply_add(p.log_space ? exp_of(gates.at[j]) : gates.at[j], h, inputs.at[j]);
        to.put(walk.time(k + j), h);
      }
  }
}

// --- Backward ---------------------------------------------------------------------------------------

// What the gradient of h_t gives where it arrives: dx_t, da_t.
template <class N>
struct Gradients {
  const Recurrence& p;
  const RecurrenceGradients& g;
  Walk walk;
  Track<N> a, h, dh, da, dx;
  N initial, sum{};  // sum: of da over time

  __device__ Gradients(const Recurrence& problem, const RecurrenceGradients& gradients, int64_t o,
                       int64_t i)
      : p(problem),
        g(gradients),
        walk{problem.length, !problem.reverse},
        a(problem.a, o, i),
        h(gradients.h, o, i),
        dh(gradients.dh, o, i),
        da(gradients.da, o, i),
        dx(gradients.dx, o, i),
        initial(state_before<N>(problem, o, i)) {}

  // Of steps k ... of the walk: da from the gradients of the states.
  __device__ Steps<N> gate_gradients(const Steps<N>& gates, const Steps<N>& of, int64_t k) {
    Steps<N> result{};
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j) {
      if (k + j >= p.length) continue;
      const N before = k + j + 1 < p.length ? h.at(walk.time(k + j + 1)) : initial;
      N gradient = of.at[j] * conj(before);
      if (p.log_space) gradient = gradient * conj(gates.at[j]);
      result.at[j] = gradient;
      sum = sum + gradient;
    }
    return result;
  }
};

// a, h, dh -> da, dx (o, i, t), dh0 (o, i); one block per channel, its lanes along time.
// Limit: memory, 20 bytes per float element.
template <class N>
__global__ void __launch_bounds__(kRecurrenceLanes)
    recurrence_backward_along(Recurrence p, RecurrenceGradients g, uint32_t fours) {
  const int64_t o = blockIdx.x / p.inner, i = blockIdx.x % p.inner;
  Gradients<N> at(p, g, o, i);
  Shared shared;
  auto* totals = shared.take<LaneTotals<N>>(1);
  auto* sums = shared.take<N>(kRecurrenceLanes);
  N carry{};
  for (int64_t first = 0; first < p.length; first += kBlockSteps) {
    const int64_t k = first + threadIdx.x * kLaneSteps;
    Steps<N> gates = read_steps(at.a, at.walk, k, fours & kA);
    Steps<N> grads = read_steps(at.dh, at.walk, k, fours & kDh);
    Map<N> all = {number(1.0f, 0.0f, N{}), N{}};
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j) {
      if (k + j >= p.length) gates.at[j] = number(1.0f, 0.0f, N{});
      else if (p.log_space) gates.at[j] = exp_of(gates.at[j]);
      const N gate = conj(gates.at[j]);
      all = then(all, Map<N>{gate, gate * grads.at[j]});
    }
    N later = before_lane(all, carry, totals, [&](N from) {
#pragma unroll
      for (int j = 0; j < kLaneSteps; ++j) from = conj(gates.at[j]) * (grads.at[j] + from);
      return from;
    });
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j) {
      grads.at[j] = grads.at[j] + later;
      later = conj(gates.at[j]) * grads.at[j];
    }
    if (g.dx.data) write_steps(at.dx, at.walk, k, fours & kDx, grads);
    if (!g.da.data) continue;
    const Steps<N> of_gates = at.gate_gradients(gates, grads, k);
    if (!g.sum_da) write_steps(at.da, at.walk, k, fours & kDa, of_gates);
  }
  sums[threadIdx.x] = at.sum;
  __syncthreads();
  if (threadIdx.x) return;
  if (g.dh0.data) Track<N>(g.dh0, o, i, 3).put(0, carry);
  if (!g.da.data || !g.sum_da) return;
  N sum{};
  for (int lane = 0; lane < kRecurrenceLanes; ++lane) sum = sum + sums[lane];
  at.da.put(0, sum);
}

// The same; one lane per channel.
template <class N>
__global__ void __launch_bounds__(kRecurrenceLanes)
    recurrence_backward_across(Recurrence p, RecurrenceGradients g) {
  const int64_t channel = int64_t{blockIdx.x} * kRecurrenceLanes + threadIdx.x;
  if (channel >= p.outer * p.inner) return;
  const int64_t o = channel / p.inner, i = channel % p.inner;
  Gradients<N> at(p, g, o, i);
  N carry{};
  for (int64_t k = 0; k < p.length; k += kLaneSteps) {
    Steps<N> gates = read_steps(at.a, at.walk, k, false);
    Steps<N> grads = read_steps(at.dh, at.walk, k, false);
#pragma unroll
    for (int j = 0; j < kLaneSteps; ++j) {
      if (k + j >= p.length) continue;
      if (p.log_space) gates.at[j] = exp_of(gates.at[j]);
      grads.at[j] = grads.at[j] + carry;
      carry = conj(gates.at[j]) * grads.at[j];
    }
    if (g.dx.data) write_steps(at.dx, at.walk, k, false, grads);
    if (!g.da.data) continue;
    const Steps<N> of_gates = at.gate_gradients(gates, grads, k);
    if (!g.sum_da) write_steps(at.da, at.walk, k, false, of_gates);
  }
  if (g.dh0.data) Track<N>(g.dh0, o, i, 3).put(0, carry);
  if (g.da.data && g.sum_da) at.da.put(0, at.sum);
}

// --------------------------------------------------------------------------------------------------

// Where channels lie next to each other, and there are enough of them, each lane takes one.
bool across(const Recurrence& p, const Operand& x) {
  return x.stride[2] != p.parts() && p.outer * p.inner >= 32 && x.stride[2] != 0;
}
uint32_t in_fours(const Recurrence& p, const Operand& x, uint32_t bit, bool down) {
  return cuda::in_fours(x, 3, 2) && (!down || p.length % kLaneSteps == 0) ? bit : 0;
}

template <class N>
void forward(const CudaStream& stream, const Recurrence& p, const Operand& h) {
  const int64_t channels = p.outer * p.inner;
  if (across(p, p.x))
    return launch(stream, "scan: linear_recurrence", recurrence_across<N>,
                  {blocks_of(ceil_div(channels, kRecurrenceLanes)), kRecurrenceLanes}, p, h);
  const uint32_t fours = in_fours(p, p.a, kA, p.reverse) | in_fours(p, p.x, kX, p.reverse) |
                         in_fours(p, h, kH, p.reverse);
  launch(stream, "scan: linear_recurrence", recurrence_along<N>,
         {blocks_of(channels), kRecurrenceLanes, shared_bytes<LaneTotals<N>>(1)}, p, h, fours);
}

template <class N>
void backward(const CudaStream& stream, const Recurrence& p, const RecurrenceGradients& g) {
  const int64_t channels = p.outer * p.inner;
  if (across(p, g.dh))
    return launch(stream, "scan: linear_recurrence backward", recurrence_backward_across<N>,
                  {blocks_of(ceil_div(channels, kRecurrenceLanes)), kRecurrenceLanes}, p, g);
  const bool down = !p.reverse;
  const uint32_t fours = in_fours(p, p.a, kA, down) | in_fours(p, g.dh, kDh, down) |
                         in_fours(p, g.da, kDa, down) | in_fours(p, g.dx, kDx, down);
  launch(stream, "scan: linear_recurrence backward", recurrence_backward_along<N>,
         {blocks_of(channels), kRecurrenceLanes,
          shared_bytes<LaneTotals<N>>(1) + shared_bytes<N>(kRecurrenceLanes)},
         p, g, fours);
}

}  // namespace

void recurrence_forward(const CudaStream& stream, const Recurrence& p, const Operand& h) {
  if (p.outer * p.inner * p.length == 0) return;
  p.complex ? forward<Complex>(stream, p, h) : forward<Real>(stream, p, h);
}

void recurrence_backward(const CudaStream& stream, const Recurrence& p,
                         const RecurrenceGradients& g) {
  if (p.outer * p.inner == 0) return;
  p.complex ? backward<Complex>(stream, p, g) : backward<Real>(stream, p, g);
}

}  // namespace pentad::scan::cuda
