// SPDX-License-Identifier: Apache-2.0
// The selective scan, backward: chunks from the last to the first. States are not stored but for those
// before each chunk. A chunk is walked through once, leaving the states before every fourth step in
// shared memory; from there the runs of four steps are computed again, their states stay in
// registers, and the gradients go back through them. 2^x is so taken about three times per step and
// state, in place of once and a transfer of all states.
//
// dB and dC are sums over channels: over the lanes of a warp as below, then over the warps, then (a
// kernel of its own) over the blocks of a group, in this order.
#include <tuple>

#include "scan/selective_scan_spans.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kScanWarps = kScanLanes / 32;
constexpr int kRuns = kChunkSteps / kRunSteps;
constexpr int64_t kMostItems = 64;  // pieces of the batch, whose sums are added at the end

struct BackwardTask {
  Scan scan;
  TileOf d_out, du, ddelta, dz;
  Operand d_last, dinitial;
  const float* stored;
  int64_t items;
  float* carry;    // [item][span][n][part][d]: the gradients of states between chunks
  float* sums;     // [item][span][sum][d]: dA [n][part], constant dB and dC likewise, dD, dbias
  float *db, *dc;  // [block of channels][b][g][t][n][part]
  SpanStates spans;
};

__host__ __device__ constexpr int64_t sums_per_channel(int64_t width) { return 3 * width + 2; }

// The sums over a warp's lanes of K numbers each: lane l gets that of number l / (32 / K). Halves of
// the numbers and of the lanes change places, so that K - 1 shuffles do for the most part.
template <int K>
__device__ float sums_of_warp(float (&v)[K]) {
  const int lane = lane_of_warp();
  int mask = 16;
#pragma unroll
  for (int half = K / 2; half >= 1; half /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(kFullWarp, sent, mask);
    }
  }
  for (; mask; mask /= 2) v[0] += __shfl_xor_sync(kFullWarp, v[0], mask);
  return v[0];
}

__device__ inline float part_of(Real x, int) { return x.re; }
__device__ inline float part_of(Complex x, int part) { return part ? x.im : x.re; }

// The gradient of y: that of out through the gate. Past the last step 0.
template <class T>
__device__ void slopes(const Scan& p, const Tile<T>& d_out, const Tile<T>& z, int lane, int run,
                       int steps, float (&dy)[kRunSteps], float (&gate)[kRunSteps],
                       float (&given)[kRunSteps]) {
  d_out.get(lane, run, given);
  if (p.z.x.data) z.get(lane, run, gate);
#pragma unroll
  for (int j = 0; j < kRunSteps; ++j) {
    if (run * kRunSteps + j >= steps) given[j] = 0.0f;
    if (!p.z.x.data || run * kRunSteps + j >= steps) gate[j] = 0.0f;
    dy[j] = p.z.x.data ? given[j] * silu(gate[j]) : given[j];
  }
}

template <class T, class N, int S>
struct BackwardShared {
  static constexpr int kWidth = S * N::kParts;
  static constexpr int kRows = kScanWarps * kChunkSteps * 2 * kWidth;
  static constexpr int kStates = kRuns * kWidth * kScanLanes;
  static size_t bytes(bool rests, bool constant) {
    return 2 * shared_bytes<float>(Coefficients<N, S>::kSize) +
           shared_bytes<T>(4 * Tile<T>::kSize) + shared_bytes<float>(kStates) +
           shared_bytes<float>(kRows) +
           (rests ? shared_bytes<float>(3 * kChunkSteps * kScanLanes) : 0) +
           (constant ? shared_bytes<float>(2 * kWidth * kScanLanes) : 0);
  }
};

// u, delta, z, d_out (b, d, t), A (d, n), B, C (b, g, n, t), stored -> du, ddelta, dz (b, d, t), and
// what a block gives to dA, dB, dC, dD, dbias.
// Limit: instructions, some thirty per step and state.
template <class T, class N, int S>
__global__ void __launch_bounds__(kScanLanes) selective_backward_kernel(BackwardTask task) {
  using Memory = BackwardShared<T, N, S>;
  constexpr int kWidth = Memory::kWidth, kFour = 4 / N::kParts;
  const Scan& p = task.scan;
  const ScanBlock block(p);
  const int lane = static_cast<int>(threadIdx.x), warp = lane / 32;
  const bool live = lane < block.channels;
  const int64_t channel = block.channel + lane, groups = (p.states + S - 1) / S, width = p.width();
  Shared shared;
  const Coefficients<N, S> b{shared.take<float>(Coefficients<N, S>::kSize), p.constant_b};
  const Coefficients<N, S> c{shared.take<float>(Coefficients<N, S>::kSize), p.constant_c};
  T* tiles = shared.take<T>(4 * Tile<T>::kSize);
  float* states = shared.take<float>(Memory::kStates);  // [run][n][part][lane]
  float* rows = shared.take<float>(Memory::kRows);      // [warp][t][dB n part, dC n part]
  // Over state groups [t][y, sum of g B, sum of A w][lane].
  float* partial = groups > 1 ? shared.take<float>(3 * kChunkSteps * kScanLanes) : nullptr;
  const bool constant = p.constant_b || p.constant_c;
  float* constants = constant ? shared.take<float>(2 * kWidth * kScanLanes) : nullptr;

  const int64_t place = block.item * p.spans + block.span;
  const Operand carries = states_at(task.carry + place * width * p.dim, p);
  float* sums = task.sums + place * sums_per_channel(width) * p.dim + channel;
  const auto add = [&](int64_t sum, float x) {
    if (live) sums[sum * p.dim] += x;
  };
  for (int64_t k = 0; live && k < sums_per_channel(width); ++k) sums[k * p.dim] = 0.0f;

  const float skip =
      live && p.d.data ? static_cast<const float*>(p.d.data)[channel * p.d.stride[0]] : 0.0f;
  const float bias =
      live && p.delta_bias.data
          ? static_cast<const float*>(p.delta_bias.data)[channel * p.delta_bias.stride[0]]
          : 0.0f;

  for (int64_t s = p.sequences * block.item / task.items;
       s < p.sequences * (block.item + 1) / task.items; ++s) {
    const ScanSequence seq(p, s);
    const int64_t first = block.span * p.chunks_per_span * kChunkSteps;
    const int64_t end = min(seq.at.steps, first + p.chunks_per_span * kChunkSteps);
    const bool to_initial = task.dinitial.data && block.span == 0;
    const auto begin_carry = [&](int64_t n0, N(&carry)[S]) {
      if (p.spans > 1)
        get_states(states_at(task.spans.of(p, s, block.span), p), 0, 0, p, channel, n0, live,
                   carry);
      else get_states(task.d_last, s * task.d_last.stride[0], 1, p, channel, n0, live, carry);
    };
    if (first >= end && to_initial) {  // an empty sequence passes its last state's gradient on
      for (int64_t g = 0; g < groups; ++g) {
        N carry[S];
        begin_carry(g * S, carry);
        put_states(task.dinitial, s * task.dinitial.stride[0], 1, p, channel, g * S, live, carry);
      }
    }
    float dd = 0.0f, dbias = 0.0f;
    const int64_t last = first + (end - first - 1) / kChunkSteps * kChunkSteps;
    for (int64_t i = last; i >= first && first < end; i -= kChunkSteps) {
      const int steps = static_cast<int>(min(int64_t{kChunkSteps}, end - i));
      const int own_steps = live ? steps : 0;  // lanes without a channel add 0 to sums over lanes
      __syncthreads();
      const Tile<T> u = fill(tiles, p.u, seq, block, i, steps);
      const Tile<T> delta = fill(tiles + Tile<T>::kSize, p.delta, seq, block, i, steps);
      Tile<T> d_out{tiles + 2 * Tile<T>::kSize, task.d_out.by_channel, p.reverse};
      if (task.d_out.x.data) fill(d_out.data, task.d_out, seq, block, i, steps);
      else
        for (int n = lane; n < Tile<T>::kSize; n += kScanLanes) from_float(0.0f, d_out.data[n]);
      Tile<T> z{tiles + 3 * Tile<T>::kSize, p.z.by_channel, p.reverse};
      if (p.z.x.data) fill(z.data, p.z, seq, block, i, steps);
      cp_async_commit();
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t n0 = g * S;
        if (g) __syncthreads();
        fill<T>(b, p, p.b, seq, block, i, steps, n0, 1.0f);
        fill<T>(c, p, p.c, seq, block, i, steps, n0, static_cast<float>(N::kParts));
        if (constant)
          for (int k = 0; k < 2 * kWidth; ++k) constants[k * kScanLanes + lane] = 0.0f;
        N a[S], h[S];
        get_states(p.a, 0, 0, p, channel, n0, live, a);
#pragma unroll
        for (int n = 0; n < S; ++n) a[n] = in_log2(a[n]);
        get_states(states_at(const_cast<float*>(task.stored) +
                                 (seq.stored + i / kChunkSteps) * width * p.dim,
                             p),
                   0, 0, p, channel, n0, live, h);
        cp_async_wait<0>();
        __syncthreads();

        // Forward through the chunk, for the states before each run.
        const int runs = (steps + kRunSteps - 1) / kRunSteps;
        const auto saved = [&](int run, int n, int part) -> float& {
          return states[((run * S + n) * N::kParts + part) * kScanLanes + lane];
        };
        for (int run = 0; run < runs; ++run) {
#pragma unroll
          for (int n = 0; n < S; ++n)
#pragma unroll
            for (int part = 0; part < N::kParts; ++part) saved(run, n, part) = part_of(h[n], part);
          if (run + 1 == runs) break;
          const RunInputs x(p, delta, u, lane, run, own_steps, bias);
#pragma unroll
          for (int j = 0; j < kRunSteps; ++j) {
            const float dtu = x.dt[j] * x.u[j];
#pragma unroll
            for (int n = 0; n < S; n += kFour) {
              N input[kFour];
              b.get(run * kRunSteps + j, n, input);
#pragma unroll
              for (int m = 0; m < kFour; ++m)
                h[n + m] = multiply_add(exp2_of(scaled(x.dt[j], a[n + m])), h[n + m],
                                        scaled(dtu, input[m]));
            }
          }
        }

        N carry[S], da[S];
        if (i == last) begin_carry(n0, carry);
        else get_states(carries, 0, 0, p, channel, n0, live, carry);
#pragma unroll
        for (int n = 0; n < S; ++n) da[n] = N{};
        for (int run = runs - 1; run >= 0; --run) {
          const RunInputs x(p, delta, u, lane, run, own_steps, bias);
          float dy[kRunSteps], gate[kRunSteps], given[kRunSteps];
          slopes(p, d_out, z, lane, run, own_steps, dy, gate, given);
          N before[kRunSteps][S];  // the states before each step
#pragma unroll
          for (int n = 0; n < S; ++n)
            before[0][n] =
                number(saved(run, n, 0), N::kParts > 1 ? saved(run, n, N::kParts - 1) : 0.0f, N{});
#pragma unroll
          for (int j = 0; j + 1 < kRunSteps; ++j) {
            const float dtu = x.dt[j] * x.u[j];
#pragma unroll
            for (int n = 0; n < S; n += kFour) {
              N input[kFour];
              b.get(run * kRunSteps + j, n, input);
#pragma unroll
              for (int m = 0; m < kFour; ++m)
                before[j + 1][n + m] = multiply_add(exp2_of(scaled(x.dt[j], a[n + m])),
                                                    before[j][n + m], scaled(dtu, input[m]));
            }
          }
          float du[kRunSteps] = {}, ddelta[kRunSteps] = {}, dz[kRunSteps] = {};
#pragma unroll
          for (int j = kRunSteps - 1; j >= 0; --j) {
            const int step = run * kRunSteps + j;
            if (step >= steps) continue;
            const float dt = x.dt[j], dtu = dt * x.u[j];
            float y = skip * x.u[j], of_b = 0.0f, of_a = 0.0f;
            float* rest = groups > 1 ? partial + step * 3 * kScanLanes + lane : nullptr;
            if (g) y = rest[0], of_b = rest[kScanLanes], of_a = rest[2 * kScanLanes];
#pragma unroll
            for (int n = 0; n<S; n += 2 * kFour> S ? S : 2 * kFour) {
              constexpr int kMany = 2 * kFour > S ? S : 2 * kFour;
              constexpr int kNumbers = 2 * kMany * N::kParts;
              float numbers[kNumbers];  // dB n part, dC n part
#pragma unroll
              for (int q = 0; q < kMany; q += kFour) {
                N input[kFour], output[kFour];
                b.get(step, n + q, input);
                c.get(step, n + q, output);
#pragma unroll
                for (int m = 0; m < kFour; ++m) {
                  const int at = n + q + m;
                  const N decay = exp2_of(scaled(dt, a[at]));
                  const N after = multiply_add(decay, before[j][at], scaled(dtu, input[m]));
                  y = add_product(output[m], after, y);
                  const N grad = add_scaled(dy[j], conj(output[m]), carry[at]);
                  const N passed = conj(decay) * grad;
                  const N w = passed * conj(before[j][at]);
                  carry[at] = passed;
                  da[at] = add_scaled(dt, w, da[at]);
                  of_a = add_rate(w, a[at], of_a);
                  of_b = add_inner(grad, input[m], of_b);
                  const N db = scaled(dtu, grad);
                  const N dc = scaled(dy[j] * static_cast<float>(N::kParts), conj(after));
#pragma unroll
                  for (int part = 0; part < N::kParts; ++part) {
                    numbers[(q + m) * N::kParts + part] = part_of(db, part);
                    numbers[kNumbers / 2 + (q + m) * N::kParts + part] = part_of(dc, part);
                  }
                }
              }
              if (constant) {
#pragma unroll
                for (int k = 0; k < kNumbers / 2; ++k) {
                  constants[(n * N::kParts + k) * kScanLanes + lane] += numbers[k];
                  constants[(kWidth + n * N::kParts + k) * kScanLanes + lane] +=
                      numbers[kNumbers / 2 + k];
                }
              }
              const float sum = sums_of_warp(numbers);
              constexpr int kShare = 32 / kNumbers;  // lanes with the same sum
              const int k = lane_of_warp() / kShare;
              if (lane_of_warp() % kShare == 0)
                rows[((warp * kChunkSteps + step) * 2 + k / (kNumbers / 2)) * kWidth +
                     n * N::kParts + k % (kNumbers / 2)] = sum;
            }
            if (g + 1 < groups) {
              rest[0] = y, rest[kScanLanes] = of_b, rest[2 * kScanLanes] = of_a;
              continue;
            }
            du[j] = fmaf(dt, of_b, skip * dy[j]);
            float slope = 1.0f;
            if (p.softplus) slope = -expm1f(-dt);  // sigmoid(x), where dt = log(1 + e^x)
            ddelta[j] = fmaf(x.u[j], of_b, of_a) * slope;
            dz[j] = given[j] * y * silu_slope(gate[j]);
            dd = fmaf(dy[j], x.u[j], dd);
            dbias += ddelta[j];
          }
          if (g + 1 < groups) continue;
          u.put(lane, run, du);  // each in the place of what nobody reads again
          delta.put(lane, run, ddelta);
          if (p.z.x.data) z.put(lane, run, dz);
        }
        if (i > first) put_states(carries, 0, 0, p, channel, n0, live, carry);
        else if (to_initial)
          put_states(task.dinitial, s * task.dinitial.stride[0], 1, p, channel, n0, live, carry);
#pragma unroll
        for (int n = 0; n < S; ++n)
          if (n0 + n < p.states)
#pragma unroll
            for (int part = 0; part < N::kParts; ++part)
              add((n0 + n) * N::kParts + part, part_of(da[n], part));
        if (constant)
          for (int k = 0; k < kWidth && n0 * N::kParts + k < width; ++k) {
            add(width + n0 * N::kParts + k, constants[k * kScanLanes + lane]);
            add(2 * width + n0 * N::kParts + k, constants[(kWidth + k) * kScanLanes + lane]);
          }
        __syncthreads();

        // The warps' rows to memory.
        const int64_t share = block.channel % p.per_group / kScanLanes;
        const int64_t line = ((share * p.batch + seq.at.b) * p.groups + block.group) * p.length;
        for (int m = lane; m < steps * 2 * kWidth; m += kScanLanes) {
          const int step = m / (2 * kWidth), which = m / kWidth % 2, k = m % kWidth;
          float* to = which ? task.dc : task.db;
          if (n0 * N::kParts + k >= width) continue;
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < kScanWarps; ++w) sum += rows[w * kChunkSteps * 2 * kWidth + m];
          to[(line + seq.time(i + step)) * width + n0 * N::kParts + k] = sum;
        }
      }
      if (task.du.x.data) store(u, task.du, seq, block, i, steps);
      if (task.ddelta.x.data) store(delta, task.ddelta, seq, block, i, steps);
      if (task.dz.x.data) store(z, task.dz, seq, block, i, steps);
    }
    add(3 * width, dd);
    add(3 * width + 1, dbias);
  }
}

// A span's gradient of the state before it, where that of the state after it is 0, and its sum of
// dt: what join_spans puts together.
// Limit: 2^x, as the forward pass.
template <class T, class N, int S>
__global__ void __launch_bounds__(kScanLanes) adjoint_ends_kernel(BackwardTask task) {
  const Scan& p = task.scan;
  const ScanBlock block(p);
  const ScanSequence seq(p, block.item);
  const int lane = static_cast<int>(threadIdx.x);
  const bool live = lane < block.channels;
  const int64_t s = block.item, channel = block.channel + lane, groups = (p.states + S - 1) / S;
  Shared shared;
  const Coefficients<N, S> c{shared.take<float>(Coefficients<N, S>::kSize), p.constant_c};
  T* tiles = shared.take<T>(3 * Tile<T>::kSize);
  const float bias =
      live && p.delta_bias.data
          ? static_cast<const float*>(p.delta_bias.data)[channel * p.delta_bias.stride[0]]
          : 0.0f;
  const int64_t first = block.span * p.chunks_per_span * kChunkSteps;
  const int64_t end = min(seq.at.steps, first + p.chunks_per_span * kChunkSteps);
  double sum_dt = 0.0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t n0 = g * S;
    N a[S], carry[S];
    get_states(p.a, 0, 0, p, channel, n0, live, a);
#pragma unroll
    for (int n = 0; n < S; ++n) {
      a[n] = in_log2(a[n]);
      carry[n] = N{};
    }
    const int64_t last = first + (end - first - 1) / kChunkSteps * kChunkSteps;
    for (int64_t i = last; i >= first && first < end; i -= kChunkSteps) {
      const int steps = static_cast<int>(min(int64_t{kChunkSteps}, end - i));
      __syncthreads();
      const Tile<T> delta = fill(tiles, p.delta, seq, block, i, steps);
      Tile<T> d_out{tiles + Tile<T>::kSize, task.d_out.by_channel, p.reverse};
      if (task.d_out.x.data) fill(d_out.data, task.d_out, seq, block, i, steps);
      else
        for (int n = lane; n < Tile<T>::kSize; n += kScanLanes) from_float(0.0f, d_out.data[n]);
      Tile<T> z{tiles + 2 * Tile<T>::kSize, p.z.by_channel, p.reverse};
      if (p.z.x.data) fill(z.data, p.z, seq, block, i, steps);
      cp_async_commit();
      fill<T>(c, p, p.c, seq, block, i, steps, n0, static_cast<float>(N::kParts));
      cp_async_wait<0>();
      __syncthreads();
      for (int run = (steps - 1) / kRunSteps; run >= 0; --run) {
        const RunInputs x(p, delta, delta, lane, run, steps, bias);
        float dy[kRunSteps], gate[kRunSteps], given[kRunSteps];
        slopes(p, d_out, z, lane, run, steps, dy, gate, given);
#pragma unroll
        for (int j = kRunSteps - 1; j >= 0; --j) {
          if (run * kRunSteps + j >= steps) continue;
          if (g == 0) sum_dt += x.dt[j];
#pragma unroll
          for (int n = 0; n < S; n += 4 / N::kParts) {
            N output[4 / N::kParts];
            c.get(run * kRunSteps + j, n, output);
#pragma unroll
            for (int m = 0; m < 4 / N::kParts; ++m)
              carry[n + m] = conj(exp2_of(scaled(x.dt[j], a[n + m]))) *
                             add_scaled(dy[j], conj(output[m]), carry[n + m]);
          }
        }
      }
    }
    put_states(states_at(task.spans.of(p, s, block.span), p), 0, 0, p, channel, n0, live, carry);
  }
  if (live) task.spans.sums[(s * p.spans + block.span) * p.dim + channel] = sum_dt;
}

// sums (places, sum, d) -> dA, constant dB and dC (d, n, part), dD, dbias (d), in the places' order.
// Limit: memory.
__global__ void __launch_bounds__(kScanLanes)
    add_places(const float* sums, int64_t places, Scan p, SelectiveScanGradients g) {
  const int64_t lane = int64_t{blockIdx.x} * kScanLanes + threadIdx.x, width = p.width();
  const int64_t all = sums_per_channel(width);
  if (lane >= all * p.dim) return;
  const int64_t d = lane % p.dim, k = lane / p.dim;
  float sum = 0.0f;
  for (int64_t place = 0; place < places; ++place) sum += sums[place * all * p.dim + lane];
  const auto write_state = [&](const Operand& x) {
    const int64_t n = k % width / p.parts(), part = k % width % p.parts();
    if (x.data)
      static_cast<float*>(x.data)[d * x.stride[0] + n * x.stride[1] + part * x.stride[2]] = sum;
  };
  const auto write_channel = [&](const Operand& x) {
    if (x.data) static_cast<float*>(x.data)[d * x.stride[0]] = sum;
  };
  if (k < width) write_state(g.da);
  else if (k < 2 * width && p.constant_b) write_state(g.db);
  else if (k >= 2 * width && k < 3 * width && p.constant_c) write_state(g.dc);
  else if (k == 3 * width) write_channel(g.dd);
  else if (k == 3 * width + 1) write_channel(g.ddelta_bias);
}

// parts (block of channels, b, g, t, n, part) -> x (b, g, n, t, part), in the blocks' order.
// Limit: memory.
__global__ void __launch_bounds__(kScanLanes) add_blocks(const float* parts, Scan p, Operand x) {
  const int64_t lane = int64_t{blockIdx.x} * kScanLanes + threadIdx.x, width = p.width();
  const int64_t all = p.batch * p.groups * p.length * width;
  if (lane >= all) return;
  const int64_t k = lane % width, t = lane / width % p.length;
  const int64_t g = lane / width / p.length % p.groups, b = lane / width / p.length / p.groups;
  float sum = 0.0f;
  for (int64_t block = 0; block < p.blocks_per_group; ++block) sum += parts[block * all + lane];
  static_cast<float*>(x.data)[b * x.stride[0] + g * x.stride[1] + k / p.parts() * x.stride[2] +
                              t * x.stride[3] + k % p.parts() * x.stride[4]] = sum;
}

struct BackwardScratch {
  ScratchCuts cuts;
  SpanStates spans;
  int64_t items;
  float *carry, *sums, *db, *dc;

  BackwardScratch(void* memory, int64_t batch, int64_t dim, int64_t length, int64_t width,
                  int64_t groups, int64_t sequences, int64_t span_count)
      : cuts(memory),
        spans(cuts, sequences, span_count, width, dim),
        // join_spans goes by sequences: a block that follows several has time in one piece.
        items(span_count > 1 ? sequences : std::min(sequences, kMostItems)),
        carry(cuts.take<float>(items * span_count * width * dim)),
        sums(cuts.take<float>(items * span_count * sums_per_channel(width) * dim)) {
    const int64_t blocks = ceil_div(dim / groups, kScanLanes);
    db = cuts.take<float>(blocks * batch * groups * length * width);
    dc = cuts.take<float>(blocks * batch * groups * length * width);
  }
};

}  // namespace

int64_t selective_scan_backward_scratch(int64_t batch, int64_t dim, int64_t length, int64_t states,
                                        int64_t groups, bool complex, int64_t sequences,
                                        bool packed, int64_t spans) {
  return BackwardScratch(nullptr, batch, dim, length, states * (complex ? 2 : 1), groups, sequences,
                         Spans(batch, dim, length, packed, spans).spans)
      .cuts.bytes;
}

void selective_scan_backward(const CudaStream& stream, const SelectiveScan& problem,
                             const Indices& begin, const SelectiveScanGradients& g, void* scratch,
                             int64_t spans) {
  const Scan p = scan_of(problem, begin, spans);
  const bool packed = begin.data;
  const BackwardScratch memory(scratch, p.batch, p.dim, p.length, p.width(), p.groups, p.sequences,
                               p.spans);
  const auto tile = [&](const Operand& x) { return tile_of(x, problem, packed); };
  const BackwardTask task = {p,           tile(g.d_out), tile(g.du), tile(g.ddelta), tile(g.dz),
                             g.d_last,    g.dinitial,    g.stored,   memory.items,   memory.carry,
                             memory.sums, memory.db,     memory.dc,  memory.spans};
  if (p.sequences > 0 && p.dim > 0)
    for_scan(problem.u.dtype, p, [&](auto type, auto number, auto in_registers) {
      using T = decltype(type);
      using N = decltype(number);
      constexpr int S = in_registers;
      if (p.spans > 1) {
        launch(
            stream, "scan: selective_scan backward spans", adjoint_ends_kernel<T, N, S>,
            {blocks_of(scan_blocks(p, p.sequences)), kScanLanes,
             shared_bytes<float>(Coefficients<N, S>::kSize) + shared_bytes<T>(3 * Tile<T>::kSize)},
            task);
        launch_join(stream, p, memory.spans, g.d_last, true, number);
      }
      launch(stream, "scan: selective_scan backward", selective_backward_kernel<T, N, S>,
             {blocks_of(scan_blocks(p, memory.items)), kScanLanes,
              BackwardShared<T, N, S>::bytes(p.states > S, p.constant_b || p.constant_c)},
             task);
    });
  if (p.dim > 0 && (g.da.data || g.db.data || g.dc.data || g.dd.data || g.ddelta_bias.data))
    launch(stream, "scan: selective_scan sums", add_places,
           {blocks_of(ceil_div(sums_per_channel(p.width()) * p.dim, kScanLanes)), kScanLanes},
           memory.sums, p.sequences > 0 ? memory.items * p.spans : 0, p, g);
  const int64_t rows = p.batch * p.groups * p.length * p.width();
  for (const auto& [x, constant, parts] :
       {std::tuple(g.db, p.constant_b, memory.db), std::tuple(g.dc, p.constant_c, memory.dc)})
    if (x.data && !constant && rows)
      launch(stream, "scan: selective_scan sums", add_blocks,
             {blocks_of(ceil_div(rows, kScanLanes)), kScanLanes}, parts, p, x);
}

}  // namespace pentad::scan::cuda
