// SPDX-License-Identifier: Apache-2.0
// What a chunk does to values, all chunks at once: outputs; backward the errors of the delta rule
// and the gradients of v, w and d.
#include "scan/matrix_chunk.cuh"

namespace pentad::scan::cuda {
namespace {

// A tile of values of a chunk and head: a block's place.
struct Place {
  int64_t head, column, values;  // values: from the column on
  Chunk chunk;

  __device__ Place(const Problem& p, int64_t tiles)
      : head(blockIdx.x / tiles % p.heads),
        column(blockIdx.x % tiles * kTile),
        values(p.values - column),
        chunk(p.chunk_of(blockIdx.x / tiles / p.heads)) {}
};

// sums += rows S, over all keys, with S of `states` [chunk][h][n][p]; x, s: tiles, [kAlong] and
// [kDown]. rows(n): of keys from n on.
template <class Rows>
__device__ void add_states(const Problem& p, const Chunk& chunk, int64_t head, int64_t column,
                           const float* states, const Rows& rows, float* x, float* s,
                           float (&sums)[kTile / 8][4]) {
  for (int64_t n = 0; n < p.keys; n += kTile) {
    const Decayed from = rows(n);
    __syncthreads();
    load_tile<kTile>(from.x, chunk.steps, p.keys - n, from.factor, x, kAlong);
    load_tile<kTile>(own(p, states, chunk.chunk, head, p.keys, p.values, n, column), p.keys - n,
                     p.values - column, nullptr, s, kDown);
    __syncthreads();
    add_product<kTile, false, false>(x, kAlong, s, kDown, sums,
                                     {chunk.steps, p.keys - n, p.values - column});
  }
  __syncthreads();
}

// states, pairs and what is written -> out (b, t, h, p) = scale ((q c) S + pairs u) + d v.
// Limit: the bytes of states and pairs, or products, 64 x values x (keys + 64) a chunk and head.
__global__ void __launch_bounds__(kLanes)
    outputs_kernel(Problem p, Workspace ws, Operand out, int64_t tiles) {
  const Place at(p, tiles);
  const Chunk& chunk = at.chunk;
  if (chunk.steps == 0) return;
  Shared shared;
  auto* x = shared.take<float>(kQ * kAlong);
  auto* s = shared.take<float>(kQ * kDown);
  auto* w = shared.take<float>(kQ);
  Decays decays(shared);
  decays.load(p, chunk, at.head);
  load_weights(p, chunk, at.head, w);
  Sums<kTile> sums = {};
  add_states(
      p, chunk, at.head, at.column, ws.states,
      [&](int64_t n) { return early_queries(p, ws, chunk, at.head, n, decays); }, x, s, sums);
  load_tile<kTile>(own(p, ws.pairs, chunk.chunk, at.head, kQ, kQ, 0, 0), kQ, kQ, nullptr, x,
                   kAlong);
  const bool strange = load_tile<kTile>(written(p, ws, chunk, at.head, at.column), chunk.steps,
                                        at.values, w, s, kDown);
  add_lower<kTile>(x, kAlong, s, kDown, __syncthreads_or(strange), sums,
                   {chunk.steps, chunk.steps, at.values});
  const Source v = p.steps(p.v, chunk, at.head, at.column);
  const Target to = p.steps_to(out, chunk, at.head, at.column);
  each<kTile>(sums, [&](int i, int c, float& sum) {
    if (i >= chunk.steps || c >= at.values) return;
    float y = p.scale * sum;
    if (p.d.data)
      y += number(p.d.data, p.d.dtype, at.head * p.d.stride[0] + (at.column + c) * p.d.stride[1]) *
           v(i, c);
    to.put(i, c, y);
  });
}

// Delta rule, backward: e = inverse (v - (k c) S) as forward, and Z = pairs^T y, of which the walk
// makes D; both [chunk][h][step][p].
// Limit: as outputs.
__global__ void __launch_bounds__(kLanes)
    errors_kernel(Problem p, Workspace ws, Operand d_out, int64_t tiles) {
  const Place at(p, tiles);
  const Chunk& chunk = at.chunk;
  if (chunk.steps == 0) return;
  Shared shared;
  auto* x = shared.take<float>(kQ * kDown);
  auto* s = shared.take<float>(kQ * kDown);
  auto* factor = shared.take<float>(kQ);
  Decays decays(shared);
  decays.load(p, chunk, at.head);
  load_scale(p.scale, factor);
  Sums<kTile> read = {};
  add_states(
      p, chunk, at.head, at.column, ws.states,
      [&](int64_t n) { return early_keys(p, ws, chunk, at.head, n, decays); }, x, s, read);
  const Source v = p.steps(p.v, chunk, at.head, at.column);
  bool strange = false;
  each<kTile>(read, [&](int i, int c, float& sum) {
    const float right = i < chunk.steps && c < at.values ? v(i, c) - sum : 0.0f;
    strange |= !is_finite(right);
    s[i * kDown + c] = right;
  });
  load_tile<kTile>(own(p, ws.inverse, chunk.chunk, at.head, kQ, kQ, 0, 0), kQ, kQ, nullptr, x,
                   kAlong);
  strange = __syncthreads_or(strange);
  const int64_t to = place(p, chunk.chunk, at.head, kQ * p.values) + at.column;
  Sums<kTile> e = {};
  const Extent extent{chunk.steps, chunk.steps, at.values};
  add_lower<kTile>(x, kAlong, s, kDown, strange, e, extent);
  each<kTile>(e, [&](int i, int c, float& sum) {
    if (i < chunk.steps && c < at.values) ws.errors[to + i * p.values + c] = sum;
  });
  __syncthreads();
  load_tile<kTile>(own(p, ws.pairs, chunk.chunk, at.head, kQ, kQ, 0, 0), kQ, kQ, nullptr, x, kDown);
  load_tile<kTile>(p.steps(d_out, chunk, at.head, at.column), chunk.steps, at.values, factor, s,
                   kDown);
  __syncthreads();
  Sums<kTile> z = {};
  add_product<kTile, true, false>(x, kDown, s, kDown, z, extent);
  each<kTile>(z, [&](int i, int c, float& sum) {
    if (i < chunk.steps && c < at.values) ws.d_errors[to + i * p.values + c] = sum;
  });
}

// gradients of the states, pairs, do -> dv (b, t, h, p), dw (b, t, h), dd [chunk][h][p], and the
// products of pairs of steps in values, dots and dots_back [chunk][h][i][j].
// Limit: as outputs, for about twice the products; all values of a chunk and head are one block.
__global__ void __launch_bounds__(kLanes)
    value_gradients_kernel(Problem p, Workspace ws, MatrixScanGradients g) {
  const int64_t head = blockIdx.x % p.heads;
  const Chunk chunk = p.chunk_of(blockIdx.x / p.heads);
  const int tid = static_cast<int>(threadIdx.x);
  if (chunk.steps == 0) {
    if (g.dd.data)
      for (int64_t c = tid; c < p.values; c += kLanes)
        ws.dd[place(p, chunk.chunk, head, p.values) + c] = 0.0f;
    return;
  }
  Shared shared;
  auto* x = shared.take<float>(kQ * kDown);
  auto* y = shared.take<float>(kQ * kDown);
  auto* u = shared.take<float>(kQ * kDown);
  auto* w = shared.take<float>(kQ);
  auto* factor = shared.take<float>(kQ);
  Decays decays(shared);
  decays.load(p, chunk, head);
  load_weights(p, chunk, head, w);
  load_scale(p.scale, factor);
  Sums<kQ> dots = {}, dots_back = {};
  float dw[2] = {};  // of the lane's two rows
  for (int64_t column = 0; column < p.values; column += kTile) {
    const int64_t values = p.values - column;
    const Source from = written(p, ws, chunk, head, column);
    const Source d_out = p.steps(g.d_out, chunk, head, column);
    const Source v = p.steps(p.v, chunk, head, column);
    Sums<kTile> d = {};
    __syncthreads();
    if (p.delta) {
      const Source given = own(p, ws.d_errors, chunk.chunk, head, kQ, p.values, 0, column);
      each<kTile>(d, [&](int i, int c, float& sum) {
        if (i < chunk.steps && c < values) sum = given(i, c);
        x[i * kAlong + c] = -w[i] * sum;
      });
    } else {
      add_states(
          p, chunk, head, column, ws.gradients,
          [&](int64_t n) { return tail_keys(p, ws, chunk, head, n, decays); }, x, y, d);
      load_tile<kTile>(own(p, ws.pairs, chunk.chunk, head, kQ, kQ, 0, 0), kQ, kQ, nullptr, x,
                       kDown);
    }
    load_tile<kTile>(d_out, chunk.steps, values, factor, y, kAlong);
    load_tile<kTile>(from, chunk.steps, values, w, u, kAlong);
    __syncthreads();
    const Extent pairs{chunk.steps, values, chunk.steps}, back{chunk.steps, chunk.steps, values};
    if (p.delta) add_product<kQ, false, true>(x, kAlong, u, kAlong, dots_back, pairs);
    else add_product<kTile, true, false>(x, kDown, y, kAlong, d, back);
    add_product<kQ, false, true>(y, kAlong, u, kAlong, dots, pairs);

    const Target dv = p.steps_to(g.dv, chunk, head, column);
    each<kTile>(d, [&](int i, int c, float& sum) {
      if (i >= chunk.steps || c >= values) return;
      dw[i / 8 % 2] += sum * from(i, c);
      if (!g.dv.data) return;
      float value = w[i] * sum;
      if (p.d.data && g.d_out.data)
        value += number(p.d.data, p.d.dtype, head * p.d.stride[0] + (column + c) * p.d.stride[1]) *
                 d_out(i, c);
      dv.put(i, c, value);
    });
    if (g.dd.data && tid < kTile && tid < values) {
      float sum = 0.0f;
      for (int i = 0; g.d_out.data && i < chunk.steps; ++i) sum += d_out(i, tid) * v(i, tid);
      ws.dd[place(p, chunk.chunk, head, p.values) + column + tid] = sum;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = tid / 32 * kWarpRows + lane_of_warp() / 4 + half * 8;
    const float sum = sum_of_row(dw[half]);
    if (g.dw.data && lane_of_warp() % 4 == 0 && i < chunk.steps)
      p.steps_to(g.dw, chunk, head).put(i, 0, sum);
  }
  const int64_t to = place(p, chunk.chunk, head, kQ * kQ);
  each<kQ>(dots, [&](int i, int j, float& sum) { ws.dots[to + i * kQ + j] = i >= j ? sum : 0.0f; });
  if (p.delta)
    each<kQ>(dots_back,
             [&](int i, int j, float& sum) { ws.dots_back[to + i * kQ + j] = i > j ? sum : 0.0f; });
}

// parts [chunk][h][p] -> dd (h, p), chunk after chunk.
// Limit: memory, 4 bytes per part.
__global__ void __launch_bounds__(kLanes) add_skips(Problem p, const float* parts, Operand dd) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + threadIdx.x, size = p.heads * p.values;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += parts[chunk * size + i];
  put_number(dd.data, dd.dtype, i / p.values * dd.stride[0] + i % p.values * dd.stride[1], sum);
}

}  // namespace

void make_outputs(const CudaStream& stream, const Problem& p, const Workspace& ws,
                  const Operand& out) {
  const int64_t blocks = p.chunks * p.heads * p.value_tiles();
  if (blocks == 0) return;
  const size_t shared = shared_bytes<float>(kQ * kAlong) + shared_bytes<float>(kQ * kDown) +
                        shared_bytes<float>(kQ) + Decays::bytes();
  launch(stream, "matrix scan: outputs", outputs_kernel, {blocks_of(blocks), kLanes, shared}, p, ws,
         out, p.value_tiles());
}

void make_errors(const CudaStream& stream, const Problem& p, const Workspace& ws,
                 const Operand& d_out) {
  const int64_t blocks = p.chunks * p.heads * p.value_tiles();
  if (blocks == 0) return;
  const size_t shared =
      2 * shared_bytes<float>(kQ * kDown) + shared_bytes<float>(kQ) + Decays::bytes();
  launch(stream, "matrix scan: errors", errors_kernel, {blocks_of(blocks), kLanes, shared}, p, ws,
         d_out, p.value_tiles());
}

void value_gradients(const CudaStream& stream, const Problem& p, const Workspace& ws,
                     const MatrixScanGradients& g) {
  const int64_t blocks = p.chunks * p.heads;
  const size_t shared =
      3 * shared_bytes<float>(kQ * kDown) + 2 * shared_bytes<float>(kQ) + Decays::bytes();
  if (blocks)
    launch(stream, "matrix scan: gradients of values", value_gradients_kernel,
           {blocks_of(blocks), kLanes, shared}, p, ws, g);
  const int64_t size = p.heads * p.values;
  if (g.dd.data && size)
    launch(stream, "matrix scan: gradients of d", add_skips,
           {blocks_of(ceil_div(size, kLanes)), kLanes}, p, ws.dd, g.dd);
}

}  // namespace pentad::scan::cuda
