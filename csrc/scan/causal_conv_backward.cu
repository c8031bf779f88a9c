// SPDX-License-Identifier: Apache-2.0
// The causal convolution, backward. A block takes 32 channels and 64 steps: x with the steps that the
// taps reach before and after, then the gradients of the sums p_t (which need x once more where there
// is an activation), then from both dx and what the steps add to the gradients of the taps. In shared
// memory the rows of channels have odd lengths, so that lanes along time and lanes along channels
// both meet different banks.
#include "scan/causal_conv.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kBackLanes = 256;
constexpr int kChannels = 32;  // of a block: one per lane of a warp
constexpr int kTileSteps = 64;
constexpr int kRun = kTileSteps / (kBackLanes / 32);  // steps of a warp

struct ConvBackwardTask {
  Conv conv;
  Operand d_out, d_final, dx;
  int64_t channel_blocks, time_blocks;
  float* sums;  // [b][time block][width + 1][dim]: of the taps' gradients, and of the bias's
};

struct ConvTiles {
  int before, x_pitch, slope_pitch;
  explicit __host__ __device__ ConvTiles(int width)
      : before(width - 1),
        x_pitch((kTileSteps + 2 * before) | 1),
        slope_pitch((kTileSteps + before) | 1) {}
  size_t bytes(int width) const {
    return shared_bytes<float>(kChannels * x_pitch) + shared_bytes<float>(kChannels * slope_pitch) +
           shared_bytes<float>(kChannels * (width | 1)) +
           shared_bytes<int64_t>(kTileSteps + 2 * before) + shared_bytes<float>(kBackLanes);
  }
};

// Step i of a tile's row holds a sequence that says whose step it is; none: padding, or outside.
constexpr int64_t kNobody = -1;

// f(channel, step) for all of a tile, so that a warp's lanes lie along what is contiguous in x.
template <class F>
__device__ void for_tile(const Operand& x, int steps, const F& f) {
  const bool by_time = x.stride[2] == 1 || x.stride[1] != 1;
  for (int i = static_cast<int>(threadIdx.x); i < kChannels * steps; i += kBackLanes)
    by_time ? f(i / steps, i % steps) : f(i % kChannels, i / kChannels);
}

// x, d_out (b, d, t), weight (d, k) -> dx (b, d, t), sums (b, time block, k, d).
// Limit: shared memory, about three accesses per step and channel for narrow convolutions, which is
// near that of the memory; multiply-adds for wide ones.
template <class T>
__global__ void __launch_bounds__(kBackLanes) conv_backward_kernel(ConvBackwardTask task) {
  const Conv& p = task.conv;
  const ConvTiles tiles(p.width);
  const int before = tiles.before, tid = static_cast<int>(threadIdx.x);
  const int lane = tid % 32, warp = tid / 32;
  const int64_t d0 = blockIdx.x % task.channel_blocks * kChannels;
  const int64_t block = blockIdx.x / task.channel_blocks;
  const int64_t b = block / task.time_blocks, t0 = block % task.time_blocks * kTileSteps;
  const int channels = static_cast<int>(min(int64_t{kChannels}, p.dim - d0));
  Shared shared;
  float* x = shared.take<float>(kChannels * tiles.x_pitch);          // from t0 - before on
  float* slope = shared.take<float>(kChannels * tiles.slope_pitch);  // dp, from t0 on; then dx
  float* taps = shared.take<float>(kChannels * (p.width | 1));
  int64_t* owner = shared.take<int64_t>(kTileSteps + 2 * before);  // from t0 - before on
  float* parts = shared.take<float>(kBackLanes);

  for (int i = tid; i < kTileSteps + 2 * before; i += kBackLanes) {
    const int64_t t = t0 - before + i;
    owner[i] = kNobody;
    if (t >= 0 && t < p.length) {
      if (p.seq_idx) owner[i] = p.index(b, t) < 0 ? kNobody : p.index(b, t);
      else owner[i] = sequence_at(p.begin, b, t, p.length).s;
    }
  }
  for (int i = tid; i < kChannels * p.width; i += kBackLanes) {
    const int c = i / p.width, k = i % p.width;
    taps[c * (p.width | 1) + k] = c < channels ? p.tap(d0 + c, k) : 0.0f;
  }
  for_tile(p.x, kTileSteps + 2 * before, [&](int c, int i) {
    const int64_t t = t0 - before + i;
    const bool there = c < channels && t >= 0 && t < p.length;
    x[c * tiles.x_pitch + i] =
        there ? to_float(static_cast<const T*>(
                    p.x.data)[b * p.x.stride[0] + (d0 + c) * p.x.stride[1] + t * p.x.stride[2]])
              : 0.0f;
  });
  for_tile(task.d_out, kTileSteps + before, [&](int c, int i) {
    const int64_t t = t0 + i;
    const bool there = c < channels && t < p.length;
    const Operand& from = task.d_out;
    slope[c * tiles.slope_pitch + i] =
        there ? to_float(static_cast<const T*>(
                    from.data)[b * from.stride[0] + (d0 + c) * from.stride[1] + t * from.stride[2]])
              : 0.0f;
  });
  __syncthreads();

  // The input of tap k of step t0 + i, whose owner is known to be somebody.
  const float* own_x = x + lane * tiles.x_pitch;
  const float* own_taps = taps + lane * (p.width | 1);
  float* own_slope = slope + lane * tiles.slope_pitch;
  const int64_t d = d0 + lane;
  const bool live = lane < channels;
  const auto input = [&](int i, int k) {
    if (owner[i + k] == owner[i + before]) return own_x[i + k];
    if (!p.initial.data || !live) return 0.0f;
    const Sequence at = sequence_at(p.begin, b, t0 + i, p.length);
    const int64_t from = t0 + i - before + k - at.first;  // negative: before the first step
    if (from >= 0) return 0.0f;
    return read(p.initial.data, p.initial.dtype,
                at.s * p.initial.stride[0] + d * p.initial.stride[1] +
                    (before + from) * p.initial.stride[2]);
  };

  // dp, of this tile and of the steps after it that read from it.
  const float bias = live ? p.bias_of(d) : 0.0f;
  for (int i = warp; i < kTileSteps + before; i += kBackLanes / 32) {
    const bool counts = owner[i + before] != kNobody;
    if (!counts) own_slope[i] = 0.0f;
    if (!counts || !p.silu) continue;
    float sum = bias;
    for (int k = 0; k < p.width; ++k) sum = fmaf(own_taps[k], input(i, k), sum);
    own_slope[i] *= silu_slope(sum);
  }
  __syncthreads();

  // The taps' gradients: a warp's run of steps, then the warps in order.
  float* sums = task.sums + block * (p.width + 1) * p.dim + d;
  for (int k = 0; k <= p.width; ++k) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int i = warp * kRun + j;
      if (owner[i + before] != kNobody)
        sum = k < p.width ? fmaf(own_slope[i], input(i, k), sum) : sum + own_slope[i];
    }
    parts[tid] = sum;
    __syncthreads();
    if (warp == 0) {
      for (int w = 1; w < kBackLanes / 32; ++w) sum += parts[w * 32 + lane];
      if (live) sums[k * p.dim] = sum;
    }
    __syncthreads();
  }

  // dx, in registers until nobody reads slopes any more.
  float dx[kRun];
  for (int j = 0; j < kRun; ++j) {
    const int i = warp * kRun + j;
    float sum = 0.0f;
    for (int k = 0; k < p.width; ++k) {
      const int by = i + before - k;  // the step whose tap k reads step i
      if (owner[by + before] == owner[i + before]) sum = fmaf(own_taps[k], own_slope[by], sum);
    }
    dx[j] = owner[i + before] == kNobody ? 0.0f : sum;
    if (task.d_final.data && live && t0 + i < p.length) {
      const Sequence at = sequence_at(p.begin, b, t0 + i, p.length);
      const int64_t place = t0 + i - (at.first + at.steps - before);
      const Operand& from = task.d_final;
      if (place >= 0)
        dx[j] += read(from.data, from.dtype,
                      at.s * from.stride[0] + d * from.stride[1] + place * from.stride[2]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kRun; ++j) own_slope[warp * kRun + j] = dx[j];
  __syncthreads();
  if (!task.dx.data) return;
  for_tile(task.dx, kTileSteps, [&](int c, int i) {
    const Operand& to = task.dx;
    if (c < channels && t0 + i < p.length)
      from_float(
          slope[c * tiles.slope_pitch + i],
          static_cast<T*>(
              to.data)[b * to.stride[0] + (d0 + c) * to.stride[1] + (t0 + i) * to.stride[2]]);
  });
}

// sums (blocks, width + 1, dim) -> dweight (d, k), dbias (d), added in the blocks' order.
// Limit: memory, or latency.
__global__ void __launch_bounds__(kBackLanes)
    conv_sums_kernel(const float* sums, int64_t blocks, int64_t dim, int64_t width, Operand dweight,
                     Operand dbias) {
  const int64_t lane = int64_t{blockIdx.x} * kBackLanes + threadIdx.x;
  if (lane >= dim * (width + 1)) return;
  const int64_t d = lane % dim, k = lane / dim;
  float sum = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) sum += sums[block * dim * (width + 1) + lane];
  if (k < width && dweight.data)
    write(dweight.data, dweight.dtype, d * dweight.stride[0] + k * dweight.stride[1], sum);
  if (k == width && dbias.data) write(dbias.data, dbias.dtype, d * dbias.stride[0], sum);
}

// dinitial (s, d, i): what the first steps of a sequence give to the inputs before them, and the
// gradients of final states that a short sequence passes on.
// Limit: latency; there are width - 1 of them.
__global__ void __launch_bounds__(kBackLanes)
    conv_initial_kernel(Conv p, Operand d_out, Operand d_final, Operand dinitial,
                        int64_t sequences) {
  const int64_t before = p.width - 1, lane = int64_t{blockIdx.x} * kBackLanes + threadIdx.x;
  if (lane >= sequences * p.dim * before) return;
  const int64_t i = lane % before, d = lane / before % p.dim, s = lane / before / p.dim;
  const Sequence at = sequence_of(p.begin, s, p.length);
  float sum = 0.0f;
  // Tap k of step i - k reads place i.
  for (int k = static_cast<int>(i); k >= 0; --k) {
    const int64_t step = i - k;
    if (step >= at.steps) break;
    const int64_t t = at.first + step;
    float slope = read(d_out.data, d_out.dtype,
                       at.b * d_out.stride[0] + d * d_out.stride[1] + t * d_out.stride[2]);
    if (p.silu) slope *= silu_slope(p.convolved(at, at.b, d, t));
    sum = fmaf(slope, p.tap(d, k), sum);
  }
  const int64_t place = i - at.steps;
  if (d_final.data && place >= 0)
    sum += read(d_final.data, d_final.dtype,
                s * d_final.stride[0] + d * d_final.stride[1] + place * d_final.stride[2]);
  write(dinitial.data, dinitial.dtype,
        s * dinitial.stride[0] + d * dinitial.stride[1] + i * dinitial.stride[2], sum);
}

}  // namespace

int64_t causal_conv_backward_scratch(int64_t batch, int64_t dim, int64_t length, int64_t width) {
  return batch * ceil_div(length, kTileSteps) * (width + 1) * dim * int64_t{sizeof(float)};
}

void causal_conv_backward(const CudaStream& stream, const CausalConv& p, const Indices& begin,
                          const CausalConvGradients& g, void* scratch) {
  const Conv conv(p, begin);
  const int64_t channel_blocks = ceil_div(p.dim, kChannels);
  const int64_t time_blocks = ceil_div(p.length, kTileSteps), blocks = p.batch * time_blocks;
  auto* sums = static_cast<float*>(scratch);
  if (blocks > 0 && channel_blocks > 0) {
    const ConvBackwardTask task = {conv,           g.d_out,     g.d_final, g.dx,
                                   channel_blocks, time_blocks, sums};
    for_type(p.x.dtype, [&](auto type) {
      launch(
          stream, "scan: causal_conv1d backward", conv_backward_kernel<decltype(type)>,
          {blocks_of(blocks * channel_blocks), kBackLanes, ConvTiles(conv.width).bytes(conv.width)},
          task);
    });
  }
  if ((g.dweight.data || g.dbias.data) && p.dim)
    launch(stream, "scan: causal_conv1d sums", conv_sums_kernel,
           {blocks_of(ceil_div(p.dim * (p.width + 1), kBackLanes)), kBackLanes}, sums, blocks,
           p.dim, p.width, g.dweight, g.dbias);
  const int64_t sequences = sequences_of(begin, p.batch),
                states = sequences * p.dim * (p.width - 1);
  if (g.dinitial.data && states)
    launch(stream, "scan: causal_conv1d initial states", conv_initial_kernel,
           {blocks_of(ceil_div(states, kBackLanes)), kBackLanes}, conv, g.d_out, g.d_final,
           g.dinitial, sequences);
}

}  // namespace pentad::scan::cuda
