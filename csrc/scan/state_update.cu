// SPDX-License-Identifier: Apache-2.0
// One token on a cache: of states, and of the convolution's latest inputs. And the projections of a
// step: a few rows by a matrix that is read once.
#include "scan/scan_elements.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kStepLanes = 128;

// Four elements from i on, `step` apart; fewer where `count` says so.
__device__ inline void read_states(const Operand& x, int64_t i, int64_t step, int count, bool fours,
                                   float (&v)[4]) {
  if (fours && count == 4) {
    if (x.dtype == DType::bf16) read_four(static_cast<const __nv_bfloat16*>(x.data) + i, v);
    else if (x.dtype == DType::f16) read_four(static_cast<const __half*>(x.data) + i, v);
    else read_four(static_cast<const float*>(x.data) + i, v);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = j < count ? read(x.data, x.dtype, i + j * step) : 0.0f;
}
__device__ inline void write_states(const Operand& x, int64_t i, int64_t step, int count,
                                    bool fours, const float (&v)[4]) {
  if (fours && count == 4) {
    if (x.dtype == DType::bf16) write_four(static_cast<__nv_bfloat16*>(x.data) + i, v);
    else if (x.dtype == DType::f16) write_four(static_cast<__half*>(x.data) + i, v);
    else write_four(static_cast<float*>(x.data) + i, v);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < count) write(x.data, x.dtype, i + j * step, v[j]);
}

// What a step reads and writes, without the host's lists.
struct UpdateTask {
  int64_t batch, heads, head_dim, states, groups, cache_rows;
  bool softplus, state_fours, a_fours, b_fours, c_fours;
  int team;  // lanes that share a channel's states: a power of two
  Operand state, x, dt, a, b, c, d, z, dt_bias, out;
  Indices rows;
};

// state (row, h, p, n), x, dt, z (b, h, p), a (h, p, n), b, c (b, g, n) -> state, out (b, h, p).
// Limit: memory, the states read and written once.
__global__ void __launch_bounds__(kStepLanes) state_update_kernel(UpdateTask t) {
  const int64_t team = (int64_t{blockIdx.x} * kStepLanes + threadIdx.x) / t.team;
  const int rank = static_cast<int>(threadIdx.x) & (t.team - 1);
  const bool inside = team < t.batch * t.heads * t.head_dim;
  const int64_t i = inside ? team % t.head_dim : 0;
  const int64_t h = inside ? team / t.head_dim % t.heads : 0;
  const int64_t b = inside ? team / t.head_dim / t.heads : 0;
  const int64_t group = h / (t.heads / t.groups);
  const auto per_token = [&](const Operand& x) {
    return read(x.data, x.dtype, b * x.stride[0] + h * x.stride[1] + i * x.stride[2]);
  };
  const auto per_channel = [&](const Operand& x) {
    return x.data ? read(x.data, x.dtype, h * x.stride[0] + i * x.stride[1]) : 0.0f;
  };
  const int64_t row = t.rows.data ? at(t.rows, b) : b;
  const bool live = inside && row >= 0 && row < t.cache_rows;
  float y = 0.0f;
  if (live) {
    float dt = per_token(t.dt) + per_channel(t.dt_bias);
    if (t.softplus) dt = softplus(dt);
    const float x = per_token(t.x), dtx = dt * x;
    const int64_t* s = t.state.stride;
    const int64_t state = row * s[0] + h * s[1] + i * s[2];
    const int64_t a = h * t.a.stride[0] + i * t.a.stride[1];
    const int64_t in = b * t.b.stride[0] + group * t.b.stride[1];
    const int64_t to = b * t.c.stride[0] + group * t.c.stride[1];
    for (int64_t n = rank * 4; n < t.states; n += t.team * 4) {
      const int count = static_cast<int>(min(int64_t{4}, t.states - n));
      float v[4], rate[4], input[4], output[4];
      read_states(t.state, state + n * s[3], s[3], count, t.state_fours, v);
      read_states(t.a, a + n * t.a.stride[2], t.a.stride[2], count, t.a_fours, rate);
      read_states(t.b, in + n * t.b.stride[2], t.b.stride[2], count, t.b_fours, input);
      read_states(t.c, to + n * t.c.stride[2], t.c.stride[2], count, t.c_fours, output);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = fmaf(exp2_fast(dt * (rate[j] * kLog2e)), v[j], dtx * input[j]);
        if (j < count) y = fmaf(output[j], v[j], y);
      }
      write_states(t.state, state + n * s[3], s[3], count, t.state_fours, v);
    }
    if (rank == 0) y = fmaf(per_channel(t.d), x, y);
  }
  for (int by = t.team / 2; by; by /= 2) y += __shfl_xor_sync(kFullWarp, y, by);
  if (!inside || rank) return;
  if (live && t.z.data) y *= silu(per_token(t.z));
  write(t.out.data, t.out.dtype, b * t.out.stride[0] + h * t.out.stride[1] + i * t.out.stride[2],
        live ? y : 0.0f);
}

// --- Convolution ------------------------------------------------------------------------------------

struct ConvStepTask {
  int64_t batch, dim, length, width, size, cache_rows;
  bool silu;
  Operand x, weight, bias, state, out;
  Indices rows, positions;
};

// x (b, d, t) behind state (row, d, size) -> out (b, d, t), state shifted on; one lane per channel.
// Limit: latency; memory for large batches.
__global__ void __launch_bounds__(kStepLanes) conv_update_kernel(ConvStepTask p) {
  const int64_t channel = int64_t{blockIdx.x} * kStepLanes + threadIdx.x;
  if (channel >= p.batch * p.dim) return;
  const int64_t b = channel / p.dim, d = channel % p.dim;
  const int64_t row = p.rows.data ? at(p.rows, b) : b;
  const bool live = row >= 0 && row < p.cache_rows;
  const int64_t x = b * p.x.stride[0] + d * p.x.stride[1];
  const int64_t out = b * p.out.stride[0] + d * p.out.stride[1];
  const int64_t state = row * p.state.stride[0] + d * p.state.stride[1];
  const int64_t weight = d * p.weight.stride[0];
  const bool ring = p.positions.data;
  int64_t position = 0;  // of input 0 in the ring
  if (ring && p.size) position = (at(p.positions, b) % p.size + p.size) % p.size;
  const auto place = [&](int64_t i) {  // of input i, of which 0 is the first new one
    const int64_t slot = ring ? ((position + i) % p.size + p.size) % p.size : p.size + i;
    return state + slot * p.state.stride[2];
  };
  const auto input = [&](int64_t i) {
    return i < 0 ? read(p.state.data, p.state.dtype, place(i))
                 : read(p.x.data, p.x.dtype, x + i * p.x.stride[2]);
  };
  const float bias = p.bias.data ? read(p.bias.data, p.bias.dtype, d * p.bias.stride[0]) : 0.0f;
  for (int64_t t = 0; t < p.length; ++t) {
    float sum = bias;
    if (live)
      for (int64_t k = 0; k < p.width; ++k)
        sum = fmaf(read(p.weight.data, p.weight.dtype, weight + k * p.weight.stride[1]),
                   input(t - (p.width - 1) + k), sum);
    write(p.out.data, p.out.dtype, out + t * p.out.stride[2],
          !live    ? 0.0f
          : p.silu ? silu(sum)
                   : sum);
  }
  if (!live || !p.size) return;
  if (!ring)
    for (int64_t i = 0; i + p.length < p.size; ++i)
      write(p.state.data, p.state.dtype, state + i * p.state.stride[2],
            read(p.state.data, p.state.dtype, state + (i + p.length) * p.state.stride[2]));
  for (int64_t t = max(int64_t{0}, p.length - p.size); t < p.length; ++t)
    write(p.state.data, p.state.dtype, ring ? place(t) : place(t - p.length), input(t));
}

// --- Projections ------------------------------------------------------------------------------------

// x (r, i), weight (o, i), bias (o) -> out (r, o); a warp per output, all rows at once.
// Limit: memory, each weight read once.
template <class T>
__global__ void __launch_bounds__(kStepLanes)
    few_rows_kernel(FewRowsLinear p, Operand out, bool fours) {
  const int64_t o = (int64_t{blockIdx.x} * kStepLanes + threadIdx.x) / 32;
  if (o >= p.outputs) return;
  const int lane = lane_of_warp();
  const T* weight = static_cast<const T*>(p.weight.data) + o * p.weight.stride[0];
  const T* x = static_cast<const T*>(p.x.data);
  float sums[kMostRows] = {};
  for (int64_t i = lane * 4; i < p.inputs; i += 128) {
    float w[4] = {};
    if (fours && i + 4 <= p.inputs) {
      read_four(weight + i, w);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i + j < p.inputs) w[j] = to_float(weight[i + j]);
    }
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      if (r >= p.rows) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i + j < p.inputs)
          sums[r] = fmaf(w[j], to_float(x[r * p.x.stride[0] + (i + j) * p.x.stride[1]]), sums[r]);
    }
  }
  const float bias = p.bias.data ? read(p.bias.data, p.bias.dtype, o * p.bias.stride[0]) : 0.0f;
#pragma unroll
  for (int r = 0; r < kMostRows; ++r) {
    if (r >= p.rows) continue;
    for (int by = 16; by; by /= 2) sums[r] += __shfl_xor_sync(kFullWarp, sums[r], by);
    if (lane == 0) {
      T value;
      from_float(sums[r] + bias, value);
      static_cast<T*>(out.data)[r * out.stride[0] + o * out.stride[1]] = value;
    }
  }
}

}  // namespace

void state_update(const CudaStream& stream, const StateUpdate& p, const Indices& rows,
                  int64_t cache_rows) {
  if (p.batch * p.heads * p.head_dim == 0) return;
  int team = 1;
  while (team < 32 && team * 4 < p.states) team *= 2;
  const UpdateTask task = {p.batch,
                           p.heads,
                           p.head_dim,
                           p.states,
                           p.groups,
                           cache_rows,
                           p.softplus,
                           in_fours(p.state, 4, 3),
                           in_fours(p.a, 3, 2),
                           in_fours(p.b, 3, 2),
                           in_fours(p.c, 3, 2),
                           team,
                           p.state,
                           p.x,
                           p.dt,
                           p.a,
                           p.b,
                           p.c,
                           p.d,
                           p.z,
                           p.dt_bias,
                           p.out,
                           rows};
  const int64_t lanes = p.batch * p.heads * p.head_dim * team;
  launch(stream, "scan: selective_state_update", state_update_kernel,
         {blocks_of(ceil_div(lanes, kStepLanes)), kStepLanes}, task);
}

void causal_conv_update(const CudaStream& stream, const ConvUpdate& p, const Indices& rows,
                        const Indices& positions, int64_t cache_rows) {
  const CausalConv& c = p.conv;
  if (c.batch * c.dim * c.length == 0) return;
  const ConvStepTask task = {c.batch,    c.dim,  c.length, c.width,  p.state_length,
                             cache_rows, c.silu, c.x,      c.weight, c.bias,
                             p.state,    p.out,  rows,     positions};
  launch(stream, "scan: causal_conv1d_update", conv_update_kernel,
         {blocks_of(ceil_div(c.batch * c.dim, kStepLanes)), kStepLanes}, task);
}

void few_rows_linear(const CudaStream& stream, const FewRowsLinear& p, const Operand& out) {
  if (p.rows * p.outputs == 0) return;
  const bool fours = in_fours(p.weight, 2, 1);
  for_type(p.x.dtype, [&](auto type) {
    launch(stream, "scan: few_rows_linear", few_rows_kernel<decltype(type)>,
           {blocks_of(ceil_div(p.outputs * 32, kStepLanes)), kStepLanes}, p, out, fours);
  });
}

}  // namespace pentad::scan::cuda
