// SPDX-License-Identifier: Apache-2.0
// The selective scan, forward.
#include "scan/selective_scan_spans.cuh"

namespace pentad::scan::cuda {
namespace {

struct ForwardTask {
  Scan scan;
  TileOf out;
  Operand last;
  float* stored;  // [chunk][n][part][d], or null
  float* carry;   // [sequence][span][n][part][d], where states do not fit into registers
  SpanStates spans;
  bool ends;  // no results but each span's last state from zero, and its sum of dt
};

// u, delta, z (b, d, t), A (d, n), B, C (b, g, n, t) -> out (b, d, t), last (s, d, n), stored.
// Limit: 2^x, one per state and step: 16 a clock and multiprocessor, where memory could feed twice
// that; real numbers take four multiplications and additions beside it, and two loads of 16 bytes
// from shared memory per four states.
template <class T, class N, int S>
__global__ void __launch_bounds__(kScanLanes) selective_forward_kernel(ForwardTask task) {
  const Scan& p = task.scan;
  const ScanBlock block(p);
  const ScanSequence seq(p, block.item);
  const int lane = static_cast<int>(threadIdx.x);
  const bool live = lane < block.channels;
  const int64_t s = block.item, channel = block.channel + lane;
  const int64_t groups = (p.states + S - 1) / S, width = p.width();
  Shared shared;
  const Coefficients<N, S> b{shared.take<float>(Coefficients<N, S>::kSize), p.constant_b};
  const Coefficients<N, S> c{shared.take<float>(Coefficients<N, S>::kSize), p.constant_c};
  T* tiles = shared.take<T>(2 * (p.z.x.data && !task.ends ? 3 : 2) * Tile<T>::kSize);
  float* sums = groups > 1 ? shared.take<float>(kChunkSteps * kScanLanes) : nullptr;  // [t][lane]
  const int per_buffer = (p.z.x.data && !task.ends ? 3 : 2) * Tile<T>::kSize;

  const int64_t first = block.span * p.chunks_per_span * kChunkSteps;
  const int64_t end = min(seq.at.steps, first + p.chunks_per_span * kChunkSteps);
  const auto steps_of = [&](int64_t i) {
    return static_cast<int>(min(int64_t{kChunkSteps}, end - i));
  };
  const auto stage = [&](int64_t i) {
    if (i < end) {
      T* buffer = tiles + (i / kChunkSteps % 2) * per_buffer;
      fill(buffer, p.u, seq, block, i, steps_of(i));
      fill(buffer + Tile<T>::kSize, p.delta, seq, block, i, steps_of(i));
      if (p.z.x.data && !task.ends)
        fill(buffer + 2 * Tile<T>::kSize, p.z, seq, block, i, steps_of(i));
    }
    cp_async_commit();
  };

  const float skip =
      live && p.d.data ? static_cast<const float*>(p.d.data)[channel * p.d.stride[0]] : 0.0f;
  const float bias =
      live && p.delta_bias.data
          ? static_cast<const float*>(p.delta_bias.data)[channel * p.delta_bias.stride[0]]
          : 0.0f;
  double sum_dt = 0.0;
  N a[S], h[S];
  // Where a state group's states are between two chunks, and before the first.
  const auto begin_group = [&](int64_t n0, bool begins) {
    get_states(p.a, 0, 0, p, channel, n0, live, a);
#pragma unroll
    for (int n = 0; n < S; ++n) a[n] = in_log2(a[n]);
    if (!begins)
      get_states(states_at(task.carry + (s * p.spans + block.span) * width * p.dim, p), 0, 0, p,
                 channel, n0, live, h);
    else if (task.ends) get_states(Operand{}, 0, 0, p, channel, n0, live, h);
    else if (p.spans > 1)
      get_states(states_at(task.spans.of(p, s, block.span), p), 0, 0, p, channel, n0, live, h);
    else get_states(p.initial, s * p.initial.stride[0], 1, p, channel, n0, live, h);
  };
  const auto end_group = [&](int64_t n0, bool ends) {
    if (!ends)
      put_states(states_at(task.carry + (s * p.spans + block.span) * width * p.dim, p), 0, 0, p,
                 channel, n0, live, h);
    else if (task.ends)
      put_states(states_at(task.spans.of(p, s, block.span), p), 0, 0, p, channel, n0, live, h);
    else if (task.last.data && block.span == p.spans - 1)
      put_states(task.last, s * task.last.stride[0], 1, p, channel, n0, live, h);
  };

  stage(first);
  for (int64_t i = first; i < end; i += kChunkSteps) {
    const int steps = steps_of(i);
    stage(i + kChunkSteps);
    cp_async_wait<1>();
    T* buffer = tiles + (i / kChunkSteps % 2) * per_buffer;
    const Tile<T> u{buffer, p.u.by_channel, p.reverse};
    const Tile<T> delta{buffer + Tile<T>::kSize, p.delta.by_channel, p.reverse};
    const Tile<T> z{buffer + 2 * Tile<T>::kSize, p.z.by_channel, p.reverse};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n0 = g * S;
      __syncthreads();
      fill<T>(b, p, p.b, seq, block, i, steps, n0, 1.0f);
      // y is twice the real part where numbers are complex.
      if (!task.ends) fill<T>(c, p, p.c, seq, block, i, steps, n0, static_cast<float>(N::kParts));
      if (groups > 1 || i == first) begin_group(n0, i == first);
      __syncthreads();
      if (task.stored && !task.ends)
        put_states(states_at(task.stored + (seq.stored + i / kChunkSteps) * width * p.dim, p), 0, 0,
                   p, channel, n0, live, h);
      for (int run = 0; run * kRunSteps < steps; ++run) {
        const RunInputs x(p, delta, u, lane, run, steps, bias);
        float y[kRunSteps] = {};
#pragma unroll
        for (int j = 0; j < kRunSteps; ++j) {
          const int step = run * kRunSteps + j;
          if (step >= steps) continue;
          y[j] = g ? sums[step * kScanLanes + lane] : skip * x.u[j];
          const float dtu = x.dt[j] * x.u[j];
          if (task.ends && g == 0) sum_dt += x.dt[j];
#pragma unroll
          for (int n = 0; n < S; n += 4 / N::kParts) {
            N input[4 / N::kParts], output[4 / N::kParts];
            b.get(step, n, input);
            if (!task.ends) c.get(step, n, output);
#pragma unroll
            for (int m = 0; m < 4 / N::kParts; ++m) {
              h[n + m] =
                  multiply_add(exp2_of(scaled(x.dt[j], a[n + m])), h[n + m], scaled(dtu, input[m]));
              if (!task.ends) y[j] = add_product(output[m], h[n + m], y[j]);
            }
          }
          if (g + 1 < groups) sums[step * kScanLanes + lane] = y[j];
        }
        if (g + 1 < groups || task.ends) continue;
        if (p.z.x.data) {
          float gate[kRunSteps];
          z.get(lane, run, gate);
#pragma unroll
          for (int j = 0; j < kRunSteps; ++j) y[j] *= silu(gate[j]);
        }
        u.put(lane, run, y);  // in the place of u, which nobody reads again
      }
      if (groups > 1) end_group(n0, i + kChunkSteps >= end);
    }
    __syncthreads();
    if (!task.ends) store(u, task.out, seq, block, i, steps);
    __syncthreads();
  }
  if (first >= end)  // an empty sequence: its first states are its last
    for (int64_t g = 0; g < groups; ++g) {
      begin_group(g * S, true);
      end_group(g * S, true);
    }
  else if (groups == 1) end_group(0, true);
  if (task.ends && live) task.spans.sums[(s * p.spans + block.span) * p.dim + channel] = sum_dt;
}

struct ForwardScratch {
  ScratchCuts cuts;
  SpanStates spans;
  float* carry;
  ForwardScratch(void* memory, int64_t sequences, int64_t spans_count, int64_t width, int64_t dim,
                 bool rests)
      : cuts(memory),
        spans(cuts, sequences, spans_count, width, dim),
        carry(rests ? cuts.take<float>(sequences * spans_count * width * dim) : nullptr) {}
};

}  // namespace

int64_t selective_scan_forward_scratch(int64_t batch, int64_t dim, int64_t length, int64_t states,
                                       bool complex, int64_t sequences, bool packed,
                                       int64_t spans) {
  return ForwardScratch(nullptr, sequences, Spans(batch, dim, length, packed, spans).spans,
                        states * (complex ? 2 : 1), dim,
                        states > states_in_registers(complex, states))
      .cuts.bytes;
}

void selective_scan_forward(const CudaStream& stream, const SelectiveScan& problem,
                            const Indices& begin, const Operand& out, const Operand& last,
                            float* stored, void* scratch, int64_t spans) {
  const Scan p = scan_of(problem, begin, spans);
  if (p.sequences * p.dim == 0) return;
  const bool rests = p.states > states_in_registers(p.complex, p.states);
  const ForwardScratch memory(scratch, p.sequences, p.spans, p.width(), p.dim, rests);
  ForwardTask task = {
      p, tile_of(out, problem, begin.data), last, stored, memory.carry, memory.spans, false};
  for_scan(problem.u.dtype, p, [&](auto type, auto number, auto in_registers) {
    using T = decltype(type);
    using N = decltype(number);
    constexpr int S = in_registers;
    const auto run = [&](bool ends) {
      task.ends = ends;
      const Grid grid{blocks_of(scan_blocks(p, p.sequences)), kScanLanes,
                      2 * shared_bytes<float>(Coefficients<N, S>::kSize) +
                          shared_bytes<T>(2 * (p.z.x.data && !ends ? 3 : 2) * Tile<T>::kSize) +
                          (rests ? shared_bytes<float>(kChunkSteps * kScanLanes) : 0)};
      launch(stream, "scan: selective_scan", selective_forward_kernel<T, N, S>, grid, task);
    };
    if (p.spans > 1) {
      run(true);
      launch_join(stream, p, memory.spans, p.initial, false, number);
    }
    run(false);
  });
}

}  // namespace pentad::scan::cuda
