// SPDX-License-Identifier: Apache-2.0
// Backward, all chunks at once: what reaches queries and keys through the states, their gradients
// with one decay per head, and those of these decays.
#include "scan/matrix_keys.cuh"

namespace pentad::scan::cuda {
namespace {

// states, their gradients, do, u and D -> sy, gu, sd [chunk][h][step][n] and both [chunk][h][n].
// Limit: the bytes of states and gradients, or products, 64 x values x keys each.
__global__ void __launch_bounds__(kLanes)
    state_gradients_kernel(Problem p, Workspace ws, Operand d_out, int64_t tiles) {
  const int64_t head = blockIdx.x / tiles % p.heads, n = blockIdx.x % tiles * kTile;
  const Chunk chunk = p.chunk_of(blockIdx.x / tiles / p.heads);
  if (chunk.steps == 0) return;
  const int64_t keys = p.keys - n;
  Shared shared;
  auto* x = shared.take<float>(kQ * kAlong);
  auto* s = shared.take<float>(kTile * kAlong);
  auto* w = shared.take<float>(kQ);
  auto* factor = shared.take<float>(kQ);
  load_weights(p, chunk, head, w);
  load_scale(p.scale, factor);
  const int tid = static_cast<int>(threadIdx.x);
  Sums<kTile> sy = {}, gu = {}, sd = {};
  float both = 0.0f;  // half of row tid / 2
  for (int64_t column = 0; column < p.values; column += kTile) {
    const int64_t values = p.values - column;
    const Extent extent{chunk.steps, values, keys};
    const Source states = own(p, ws.states, chunk.chunk, head, p.keys, p.values, n, column);
    const Source gradients = own(p, ws.gradients, chunk.chunk, head, p.keys, p.values, n, column);
    __syncthreads();
    load_tile<kTile>(p.steps(d_out, chunk, head, column), chunk.steps, values, factor, x, kAlong);
    load_tile<kTile>(states, keys, values, nullptr, s, kAlong);
    __syncthreads();
    add_product<kTile, false, true>(x, kAlong, s, kAlong, sy, extent);
    if (p.delta) {
      __syncthreads();
      load_tile<kTile>(own(p, ws.d_errors, chunk.chunk, head, kQ, p.values, 0, column), chunk.steps,
                       values, w, x, kAlong);
      __syncthreads();
      add_product<kTile, false, true>(x, kAlong, s, kAlong, sd, extent);
    }
    __syncthreads();
    load_tile<kTile>(written(p, ws, chunk, head, column), chunk.steps, values, w, x, kAlong);
    load_tile<kTile>(gradients, keys, values, nullptr, s, kAlong);
    __syncthreads();
    add_product<kTile, false, true>(x, kAlong, s, kAlong, gu, extent);
    const int row = tid / 2, first = tid % 2 * (kTile / 2);
    for (int c = first; row < keys && c < first + kTile / 2 && c < values; ++c)
      both += states(row, c) * s[row * kAlong + c];
  }
  both += __shfl_xor_sync(kFullWarp, both, 1);
  if (tid % 2 == 0 && tid / 2 < keys)
    ws.both[place(p, chunk.chunk, head, p.keys) + n + tid / 2] = both;
  const int64_t to = place(p, chunk.chunk, head, kQ * p.keys) + n;
  const auto store = [&](float (&sums)[kTile / 8][4], float* array, float sign) {
    each<kTile>(sums, [&](int i, int c, float& sum) {
      if (c < keys) array[to + i * p.keys + c] = sign * sum;
    });
  };
  store(sy, ws.sy, 1.0f);
  store(gu, ws.gu, 1.0f);
  if (p.delta) store(sd, ws.sd, -1.0f);
}

// One decay per head:
//
//   dq_i = c_i sy_i + sum_j E_ij k_j                  E = M o dots
//   dk_j = tail_j gu_j + sum_i E_ij q_i + c_j sd_j + sum_i (F_ij + F_ji) k_i    F = M o dots_back
//
// summed over the heads of a piece, to dq and dk (b, t, g, n) or to this piece's part.
// Limit: products, 64 x 64 x keys, two a head, delta four; each tile of keys is a block's.
__global__ void __launch_bounds__(kLanes)
    key_gradients_kernel(Problem p, Workspace ws, KeyTargets to, int64_t tiles, int64_t pieces) {
  const KeyBlock at(p, tiles, pieces, kTile);
  const Chunk& chunk = at.chunk;
  if (chunk.steps == 0) return;
  Shared shared;
  auto* q = shared.take<float>(kQ * kDown);
  auto* k = shared.take<float>(kQ * kDown);
  auto* e = shared.take<float>(kQ * kAlong);
  auto* m = shared.take<float>(kQ * kAlong);
  Decays decays(shared);
  load_tile<kTile>(p.steps(p.q, chunk, at.group, at.n), chunk.steps, at.keys, nullptr, q, kDown);
  load_tile<kTile>(p.steps(p.k, chunk, at.group, at.n), chunk.steps, at.keys, nullptr, k, kDown);
  Sums<kTile> dq = {}, dk = {};
  const Extent extent{chunk.steps, chunk.steps, at.keys};
  const int tid = static_cast<int>(threadIdx.x);
  for (int64_t head = at.first_head; head < at.end_head; ++head) {
    decays.load(p, chunk, head);
    decays.products(m, kAlong);
    const int64_t own = place(p, chunk.chunk, head, kQ * p.keys) + at.n;
    const auto add = [&](const float* array, const float* factor, float (&sums)[kTile / 8][4]) {
      each<kTile>(sums, [&](int i, int c, float& sum) {
        if (i < chunk.steps && c < at.keys) sum += factor[i] * array[own + i * p.keys + c];
      });
    };
    add(ws.sy, decays.c, dq);
    add(ws.gu, decays.tail, dk);
    if (p.delta) add(ws.sd, decays.c, dk);
    __syncthreads();
    const int64_t pairs = place(p, chunk.chunk, head, kQ * kQ);
    for (int i = tid; i < kQ * kQ; i += kLanes) {
      const int place = i / kQ * kAlong + i % kQ;
      e[place] = i / kQ >= i % kQ ? m[place] * ws.dots[pairs + i] : 0.0f;
    }
    __syncthreads();
    add_product<kTile, false, false>(e, kAlong, k, kDown, dq, extent);
    add_product<kTile, true, false>(e, kAlong, q, kDown, dk, extent);
    if (!p.delta) continue;
    __syncthreads();
    for (int i = tid; i < kQ * kQ; i += kLanes) {  // F and its transpose are one symmetric matrix
      const int row = i / kQ, column = i % kQ;
      const int high = max(row, column), low = min(row, column);
      e[row * kAlong + column] =
          row == column ? 0.0f : m[high * kAlong + low] * ws.dots_back[pairs + high * kQ + low];
    }
    __syncthreads();
    add_product<kTile, false, false>(e, kAlong, k, kDown, dk, extent);
  }
  const auto store = [&](float (&sums)[kTile / 8][4], const Operand& whole, float* part) {
    each<kTile>(sums, [&](int i, int c, float& sum) {
      if (i < chunk.steps && c < at.keys) at.put(p, whole, part, i, c, sum);
    });
  };
  store(dq, to.dq, to.dq_parts);
  store(dk, to.dk, to.dk_parts);
}

// One decay per head, da (b, t, h): a_t multiplies what passes from steps j < t, or from the state,
// to steps i >= t, or to the last state. With X_ij the products of pairs before the decays,
//
//   da_t = sum_{i >= t} M_it r_i(t)      r_i(t + 1) = a_t r_i(t) + X_it      r_i(0) = q_i . S y_i ...
//
// and the last state as one more i: no logarithms, no division.
// Limit: products, 64 x 64 x keys a head, and the chain of 64 steps.
__global__ void __launch_bounds__(kLanes)
    decay_gradients_kernel(Problem p, Workspace ws, Operand da) {
  constexpr int kOdd = kQ + 1;  // a lane walks along a row
  const int64_t head = blockIdx.x % p.heads, group = p.group(head);
  const Chunk chunk = p.chunk_of(blockIdx.x / p.heads);
  if (chunk.steps == 0) return;
  Shared shared;
  auto* q = shared.take<float>(kQ * kAlong);
  auto* k = shared.take<float>(kQ * kAlong);
  auto* x = shared.take<float>(kQ * kOdd);
  auto* last = shared.take<float>(kQ);
  auto* ends = shared.take<float>(kQ);
  auto* starts = shared.take<float>(kQ);
  Decays decays(shared);
  decays.load(p, chunk, head);
  const int tid = static_cast<int>(threadIdx.x), row = tid / 2;
  const int64_t own = place(p, chunk.chunk, head, kQ * p.keys);
  float start = 0.0f, end = 0.0f, both = 0.0f;  // half of a row's
  Sums<kQ> kq = {}, kk = {};
  for (int64_t n = 0; n < p.keys; n += kTile) {
    const int64_t keys = p.keys - n;
    __syncthreads();
    load_tile<kTile>(p.steps(p.q, chunk, group, n), chunk.steps, keys, nullptr, q, kAlong);
    load_tile<kTile>(p.steps(p.k, chunk, group, n), chunk.steps, keys, nullptr, k, kAlong);
    __syncthreads();
    add_product<kQ, false, true>(q, kAlong, k, kAlong, kq, {chunk.steps, keys, chunk.steps});
    if (p.delta)
      add_product<kQ, false, true>(k, kAlong, k, kAlong, kk, {chunk.steps, keys, chunk.steps});
    const int first = tid % 2 * (kTile / 2);
    for (int c = first; row < chunk.steps && c < first + kTile / 2 && c < keys; ++c) {
      const int64_t at = own + row * p.keys + n + c;
      start += q[row * kAlong + c] * ws.sy[at];
      if (p.delta) start += k[row * kAlong + c] * ws.sd[at];
      end += k[row * kAlong + c] * ws.gu[at];
    }
    if (tid < kTile && tid < keys) both += ws.both[place(p, chunk.chunk, head, p.keys) + n + tid];
  }
  start += __shfl_xor_sync(kFullWarp, start, 1);
  end += __shfl_xor_sync(kFullWarp, end, 1);
  if (tid % 2 == 0) starts[row] = start, ends[row] = end;
  if (tid < kTile) last[tid] = both;
  const int64_t pairs = place(p, chunk.chunk, head, kQ * kQ);
  each<kQ>(kq, [&](int i, int j, float& sum) {
    x[i * kOdd + j] = i >= j ? sum * ws.dots[pairs + i * kQ + j] : 0.0f;
  });
  if (p.delta)
    each<kQ>(kk, [&](int i, int j, float& sum) {
      if (i > j) x[i * kOdd + j] += sum * ws.dots_back[pairs + i * kQ + j];
    });
  __syncthreads();
  decays.products(q, kAlong);
  __syncthreads();
  if (tid < kQ) {
    float r = starts[tid];
    for (int t = 0; t <= tid; ++t) {
      const float pair = x[tid * kOdd + t];
      x[tid * kOdd + t] = q[tid * kAlong + t] * r;
      r = decays.a[t] * r + pair;
    }
  } else if (tid == kQ) {
    float r = 0.0f;
    for (int i = 0; i < kTile; ++i) r += last[i];
    for (int t = 0; t < kQ; ++t) {
      last[t] = r;
      r = decays.a[t] * r + ends[t];
    }
  }
  __syncthreads();
  if (tid >= chunk.steps) return;
  float sum = decays.tail[tid] * last[tid];
  for (int i = tid; i < chunk.steps; ++i) sum += x[i * kOdd + tid];
  p.steps_to(da, chunk, head).put(tid, 0, sum);
}

// parts [piece][b][t][g][n] -> to (b, t, g, n), piece after piece.
// Limit: memory, 4 bytes per part.
__global__ void __launch_bounds__(kLanes)
    add_pieces(Problem p, const float* parts, int64_t pieces, Operand to) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  const int64_t size = p.batch * p.length * p.groups * p.keys;
  if (at >= size) return;
  float sum = 0.0f;
  for (int64_t piece = 0; piece < pieces; ++piece) sum += parts[piece * size + at];
  const int64_t n = at % p.keys, group = at / p.keys % p.groups;
  const int64_t t = at / p.keys / p.groups % p.length, b = at / p.keys / p.groups / p.length;
  put_number(to.data, to.dtype,
             b * to.stride[0] + t * to.stride[1] + group * to.stride[2] + n * to.stride[3], sum);
}

}  // namespace

void state_gradients(const CudaStream& stream, const Problem& p, const Workspace& ws,
                     const Operand& d_out) {
  const int64_t blocks = p.chunks * p.heads * p.key_tiles();
  if (blocks == 0) return;
  const size_t shared = 2 * shared_bytes<float>(kQ * kAlong) + 2 * shared_bytes<float>(kQ);
  launch(stream, "matrix scan: gradients through states", state_gradients_kernel,
         {blocks_of(blocks), kLanes, shared}, p, ws, d_out, p.key_tiles());
}

void key_gradients(const CudaStream& stream, const Problem& p, const Workspace& ws,
                   const MatrixScanGradients& g) {
  const int64_t pieces = pieces_of(p), blocks = p.chunks * p.groups * pieces * p.key_tiles();
  if (blocks == 0 || !(g.dq.data || g.dk.data)) return;
  const size_t shared =
      2 * shared_bytes<float>(kQ * kDown) + 2 * shared_bytes<float>(kQ * kAlong) + Decays::bytes();
  launch(stream, "matrix scan: gradients of keys", key_gradients_kernel,
         {blocks_of(blocks), kLanes, shared}, p, ws, KeyTargets{g.dq, g.dk, ws.dq, ws.dk},
         p.key_tiles(), pieces);
}

void decay_gradients(const CudaStream& stream, const Problem& p, const Workspace& ws,
                     const Operand& da) {
  const int64_t blocks = p.chunks * p.heads;
  if (blocks == 0 || !da.data) return;
  const size_t shared = 2 * shared_bytes<float>(kQ * kAlong) + shared_bytes<float>(kQ * (kQ + 1)) +
                        3 * shared_bytes<float>(kQ) + Decays::bytes();
  launch(stream, "matrix scan: gradients of decays", decay_gradients_kernel,
         {blocks_of(blocks), kLanes, shared}, p, ws, da);
}

void add_key_pieces(const CudaStream& stream, const Problem& p, const Workspace& ws,
                    const MatrixScanGradients& g) {
  const int64_t pieces = pieces_of(p), size = p.batch * p.length * p.groups * p.keys;
  if (pieces == 1 || size == 0) return;
  const Grid grid{blocks_of(ceil_div(size, kLanes)), kLanes};
  if (g.dq.data) launch(stream, "matrix scan: add dq", add_pieces, grid, p, ws.dq, pieces, g.dq);
  if (g.dk.data) launch(stream, "matrix scan: add dk", add_pieces, grid, p, ws.dk, pieces, g.dk);
}

}  // namespace pentad::scan::cuda
