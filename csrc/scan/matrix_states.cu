// SPDX-License-Identifier: Apache-2.0
// The states before every chunk, chunk after chunk, and their gradients, from the last chunk to the
// first: the one part that has an order in time. Heads and tiles of the state are blocks of their own.
#include "scan/matrix_chunk.cuh"

namespace pentad::scan::cuda {
namespace {

// --- Without the delta rule -----------------------------------------------------------------------

// k (b, t, g, n), v (b, t, h, p) -> states [chunk][h][n][p], S' = c S + (k tail)^T (w v); backward
// q, do -> gradients, G' = c G + (q c)^T y. A block has a tile of 64 x 64, in registers.
// Limit: how soon a block's rows come from memory; then the states' bytes.
__global__ void __launch_bounds__(kLanes)
    walk_kernel(Problem p, Workspace ws, StateWalk walk, int64_t key_tiles, int64_t value_tiles) {
  int64_t block = blockIdx.x;
  const int64_t column = block % value_tiles * kTile;
  const int64_t n = (block /= value_tiles) % key_tiles * kTile;
  const int64_t head = (block /= key_tiles) % p.heads;
  const Steps steps = p.steps_of(block / p.heads);
  const int64_t keys = p.keys - n, values = p.values - column;
  Shared shared;
  auto* rows = shared.take<float>(kQ * kDown);
  auto* written = shared.take<float>(kQ * kDown);
  auto* factor = shared.take<float>(kQ);
  Decays decays(shared);
  float* const states = walk.backward ? ws.gradients : ws.states;

  Sums<kTile> state;
  const Operand& start = walk.start;
  each<kTile>(state, [&](int i, int c, float& x) {
    const bool inside = start.data && i < keys && c < values;
    x = inside ? number(start.data, start.dtype,
                        steps.sequence * start.stride[0] + head * start.stride[1] +
                            (n + i) * start.stride[2] + (column + c) * start.stride[3])
               : 0.0f;
  });
  const int64_t chunks = steps.chunks();
  for (int64_t at = 0; at < chunks; ++at) {
    const Chunk chunk = p.chunk_of(steps, walk.backward ? chunks - 1 - at : at);
    float* const to =
        states + place(p, chunk.chunk, head, p.keys * p.values) + n * p.values + column;
    each<kTile>(state, [&](int i, int c, float& x) {
      if (i < keys && c < values) to[i * p.values + c] = x;
    });
    decays.load(p, chunk, head);
    if (walk.backward) load_scale(p.scale, factor);
    else load_weights(p, chunk, head, factor);
    __syncthreads();
    const Decayed from = walk.backward ? early_queries(p, ws, chunk, head, n, decays)
                                       : tail_keys(p, ws, chunk, head, n, decays);
    load_tile<kTile>(from.x, chunk.steps, keys, from.factor, rows, kDown);
    load_tile<kTile>(p.steps(walk.backward ? walk.d_out : p.v, chunk, head, column), chunk.steps,
                     values, factor, written, kDown);
    __syncthreads();
    each<kTile>(state,
                [&](int i, int, float& x) { x *= whole_decay(p, ws, chunk, head, n + i, decays); });
    add_product<kTile, true, false>(rows, kDown, written, kDown, state,
                                    {keys, chunk.steps, values});
  }
  const Operand& end = walk.end;
  each<kTile>(state, [&](int i, int c, float& x) {
    if (end.data && i < keys && c < values)
      put_number(end.data, end.dtype,
                 steps.sequence * end.stride[0] + head * end.stride[1] + (n + i) * end.stride[2] +
                     (column + c) * end.stride[3],
                 x);
  });
}

// --- With it --------------------------------------------------------------------------------------

// A block has all keys of kColumns value columns, in shared memory: what is written depends on all.
//
//   e = inverse (v - (k c) S)         S' = c S + (k tail)^T (w e)
//   D = inverse_back^T (Z + (k tail) G)    G' = c G + (q c)^T y - (k c)^T (w D)
//
// e, and D in the place of Z = pairs^T y, go to memory: [chunk][h][step][p].
// Limit: the chain from chunk to chunk of three (four) products and their loads.
template <int kColumns, bool kBackward>
__global__ void __launch_bounds__(kLanes, 3)
    walk_delta_kernel(Problem p, Workspace ws, StateWalk walk, int64_t value_tiles) {
  constexpr int kStep =
      kColumns == 8 ? 8 : kColumns + 8;  // free of bank conflicts down the columns
  const int64_t column = blockIdx.x % value_tiles * kColumns;
  const int64_t head = blockIdx.x / value_tiles % p.heads;
  const Steps steps = p.steps_of(blockIdx.x / value_tiles / p.heads);
  const int64_t values = min(int64_t{kColumns}, p.values - column);
  const int64_t padded = (p.keys + kTile - 1) / kTile * kTile;
  Shared shared;
  auto* state = shared.take<float>(padded * kStep);
  auto* rows = shared.take<float>(kQ * kDown);
  auto* x = shared.take<float>(kQ * kStep);
  auto* w = shared.take<float>(kQ);
  auto* factor = shared.take<float>(kQ);
  Decays decays(shared);
  float* const states = kBackward ? ws.gradients : ws.states;
  const int tid = static_cast<int>(threadIdx.x);

  const auto boundary = [&](const Operand& array, int64_t n, int64_t c) {
    return steps.sequence * array.stride[0] + head * array.stride[1] + n * array.stride[2] +
           (column + c) * array.stride[3];
  };
  for (int64_t i = tid; i < padded * kColumns; i += kLanes) {
    const int64_t n = i / kColumns, c = i % kColumns;
    const bool inside = walk.start.data && n < p.keys && c < values;
    state[n * kStep + c] =
        inside ? number(walk.start.data, walk.start.dtype, boundary(walk.start, n, c)) : 0.0f;
  }
  const int64_t chunks = steps.chunks();
  for (int64_t at = 0; at < chunks; ++at) {
    const Chunk chunk = p.chunk_of(steps, kBackward ? chunks - 1 - at : at);
    decays.load(p, chunk, head);
    load_weights(p, chunk, head, w);
    load_scale(p.scale, factor);
    float* const to = states + place(p, chunk.chunk, head, p.keys * p.values) + column;
    for (int64_t i = tid; i < p.keys * kColumns; i += kLanes)
      if (i % kColumns < values)
        to[i / kColumns * p.values + i % kColumns] = state[i / kColumns * kStep + i % kColumns];

    // What the keys read.
    Sums<kColumns> read = {};
    for (int64_t n = 0; n < p.keys; n += kTile) {
      const Decayed keys = kBackward ? tail_keys(p, ws, chunk, head, n, decays)
                                     : early_keys(p, ws, chunk, head, n, decays);
      __syncthreads();
      load_tile<kTile>(keys.x, chunk.steps, p.keys - n, keys.factor, rows, kAlong);
      __syncthreads();
      add_product<kColumns, false, false>(rows, kAlong, state + n * kStep, kStep, read,
                                          {chunk.steps, p.keys - n, values});
    }
    __syncthreads();

    // The right side of the system, then its solution.
    const Source known = kBackward ? own(p, ws.d_errors, chunk.chunk, head, kQ, p.values, 0, column)
                                   : p.steps(p.v, chunk, head, column);
    bool strange = false;
    each<kColumns>(read, [&](int i, int c, float& sum) {
      const bool inside = i < chunk.steps && c < values;
      const float right = inside ? known(i, c) + (kBackward ? sum : -sum) : 0.0f;
      strange |= !is_finite(right);
      x[i * kStep + c] = right;
    });
    const float* inverse = kBackward ? ws.inverse_back : ws.inverse;
    load_tile<kTile>(own(p, inverse, chunk.chunk, head, kQ, kQ, 0, 0), kQ, kQ, nullptr, rows,
                     kBackward ? kDown : kAlong);
    strange = __syncthreads_or(strange);
    Sums<kColumns> solved = {};
    const Extent pairs{chunk.steps, chunk.steps, values};
    if constexpr (kBackward)
      add_product<kColumns, true, false>(rows, kDown, x, kStep, solved, pairs);
    else add_lower<kColumns>(rows, kAlong, x, kStep, strange, solved, pairs);
    __syncthreads();
    float* const errors =
        (kBackward ? ws.d_errors : ws.errors) + place(p, chunk.chunk, head, kQ * p.values) + column;
    each<kColumns>(solved, [&](int i, int c, float& error) {
      if (i < chunk.steps && c < values) errors[i * p.values + c] = error;
      x[i * kStep + c] = i < chunk.steps ? (kBackward ? -error : error) * w[i] : 0.0f;
    });

    // The state after the chunk, or its gradient before it.
    for (int64_t n = 0; n < p.keys; n += kTile) {
      const Decayed keys = kBackward ? early_keys(p, ws, chunk, head, n, decays)
                                     : tail_keys(p, ws, chunk, head, n, decays);
      __syncthreads();
      load_tile<kTile>(keys.x, chunk.steps, p.keys - n, keys.factor, rows, kDown);
      __syncthreads();
      Sums<kColumns> sums;
      each<kColumns>(sums, [&](int i, int c, float& sum) {
        sum = state[(n + i) * kStep + c] * whole_decay(p, ws, chunk, head, n + i, decays);
      });
      add_product<kColumns, true, false>(rows, kDown, x, kStep, sums,
                                         {p.keys - n, chunk.steps, values});
      each<kColumns>(sums, [&](int i, int c, float& sum) { state[(n + i) * kStep + c] = sum; });
    }
    if constexpr (kBackward) {
      __syncthreads();
      load_tile<kColumns>(p.steps(walk.d_out, chunk, head, column), chunk.steps, values, factor, x,
                          kStep);
      for (int64_t n = 0; n < p.keys; n += kTile) {
        const Decayed queries = early_queries(p, ws, chunk, head, n, decays);
        __syncthreads();
        load_tile<kTile>(queries.x, chunk.steps, p.keys - n, queries.factor, rows, kDown);
        __syncthreads();
        Sums<kColumns> sums;
        each<kColumns>(sums, [&](int i, int c, float& sum) { sum = state[(n + i) * kStep + c]; });
        add_product<kColumns, true, false>(rows, kDown, x, kStep, sums,
                                           {p.keys - n, chunk.steps, values});
        each<kColumns>(sums, [&](int i, int c, float& sum) { state[(n + i) * kStep + c] = sum; });
      }
    }
  }
  if (!walk.end.data) return;
  __syncthreads();
  for (int64_t i = tid; i < p.keys * kColumns; i += kLanes) {
    const int64_t n = i / kColumns, c = i % kColumns;
    if (c < values)
      put_number(walk.end.data, walk.end.dtype, boundary(walk.end, n, c), state[n * kStep + c]);
  }
}

constexpr int64_t kManyKeys = 256;  // above, columns of a block are 8: its state stays below 50 KB

template <int kColumns>
void walk_delta(const CudaStream& stream, const Problem& p, const Workspace& ws,
                const StateWalk& walk) {
  constexpr int kStep = kColumns == 8 ? 8 : kColumns + 8;
  const int64_t tiles = ceil_div(p.values, kColumns);
  const size_t shared = shared_bytes<float>(p.key_tiles() * kTile * kStep) +
                        shared_bytes<float>(kQ * kDown) + shared_bytes<float>(kQ * kStep) +
                        2 * shared_bytes<float>(kQ) + Decays::bytes();
  const Grid grid{blocks_of(p.sequences * p.heads * tiles), kLanes, shared};
  launch(stream, "matrix scan: states of the delta rule",
         walk.backward ? walk_delta_kernel<kColumns, true> : walk_delta_kernel<kColumns, false>,
         grid, p, ws, walk, tiles);
}

}  // namespace

void walk_states(const CudaStream& stream, const Problem& p, const Workspace& ws,
                 const StateWalk& walk) {
  if (p.sequences * p.heads == 0) return;
  if (p.delta) {
    if (p.keys > kManyKeys) walk_delta<8>(stream, p, ws, walk);
    else walk_delta<32>(stream, p, ws, walk);
    return;
  }
  const size_t shared =
      2 * shared_bytes<float>(kQ * kDown) + shared_bytes<float>(kQ) + Decays::bytes();
  const Grid grid{blocks_of(p.sequences * p.heads * p.key_tiles() * p.value_tiles()), kLanes,
                  shared};
  launch(stream, "matrix scan: states", walk_kernel, grid, p, ws, walk, p.key_tiles(),
         p.value_tiles());
}

}  // namespace pentad::scan::cuda
