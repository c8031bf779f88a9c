// SPDX-License-Identifier: Apache-2.0
// Backward with one decay per key, all chunks at once: the gradients of queries, keys and decays.
#include "scan/matrix_keys.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kKeys = 32;    // of a block; a warp has all of them and every fourth step
constexpr int kGroups = 4;   // of steps
constexpr int kColumns = 8;  // of a warp, for the decays: four lanes have every fourth step of one
constexpr int kLanesOfColumn = 4;

// tile[step][kKeys] of x, zeros or `rest` outside.
__device__ void load_columns(const Source& x, int64_t rows, int64_t columns, float rest,
                             float* tile) {
  for (int at = static_cast<int>(threadIdx.x); at < kQ * kKeys; at += kLanes) {
    const int i = at / kKeys, c = at % kKeys;
    tile[at] = i < rows && c < columns ? x(i, c) : rest;
  }
}

struct Tiles {
  float *q, *k, *a, *dots, *dots_back;
};

// Each of dq_i and dk_j by Horner's rule along the other step, with M_ij in place of a power:
//
//   dq_i = c_i sy_i + sum_{j <= i} M_ij dots_ij k_j
//   dk_j = tail_j gu_j + c_j sd_j + sum_{i >= j} M_ij (dots_ij q_i + dots_back_ij k_i)
//          + sum_{i < j} M_ji dots_back_ji k_i
__device__ void add_pairs(const Tiles& x, bool delta, int i, int n, float& dq, float& dk) {
  float here = 0.0f, back = 0.0f;
  for (int j = 0; j <= i; ++j) {
    const float decay = x.a[j * kKeys + n], key = x.k[j * kKeys + n];
    here = here * decay + x.dots[i * kQ + j] * key;
    if (delta) back = back * decay + x.dots_back[i * kQ + j] * key;
  }
  float later = 0.0f;
  for (int l = kQ - 1; l >= i; --l) {
    if (l + 1 < kQ) later *= x.a[(l + 1) * kKeys + n];
    later += x.dots[l * kQ + i] * x.q[l * kKeys + n];
    if (delta) later += x.dots_back[l * kQ + i] * x.k[l * kKeys + n];
  }
  dq += here;
  dk += back + later;
}

// da_t of column n, as decay_gradients_kernel, over every fourth step i; r: r_i(t).
__device__ void decay_column(const Tiles& x, bool delta, int n, float (&r)[kQ / kLanesOfColumn],
                             float last, const float* ends, int steps, bool inside,
                             const Target& da) {
  const int mine = lane_of_warp() % kLanesOfColumn;
  for (int t = 0; t < steps; ++t) {
    const float decay = x.a[t * kKeys + n], key = x.k[t * kKeys + n];
    float product = 1.0f, sum = 0.0f;  // product: a_{t+1} ... a_i
#pragma unroll
    for (int s = 0; s < kQ / kLanesOfColumn; ++s) {
#pragma unroll
      for (int e = 0; e < kLanesOfColumn; ++e) {
        const int i = s * kLanesOfColumn + e;
        if (i > t) product *= x.a[i * kKeys + n];
        if (e != mine || i < t) continue;
        sum += product * r[s];
        float pair = x.dots[i * kQ + t] * x.q[i * kKeys + n];
        if (delta) pair += x.dots_back[i * kQ + t] * x.k[i * kKeys + n];
        r[s] = decay * r[s] + pair * key;
      }
    }
    sum = sum_of_row(sum) + product * last;
    last = decay * last + key * ends[t * kKeys];
    if (mine == 0 && inside) da.put(t, 0, sum);
  }
}

// q, k (b, t, g, n), a (b, t, h, n), the products of pairs, sy, gu, sd, both -> dq, dk (b, t, g, n) or
// this piece's part, da (b, t, h, n).
// Limit: the float32 units, about 10 operations (delta: 16) per key and pair of a head.
__global__ void __launch_bounds__(kLanes)
    key_decay_gradients_kernel(Problem p, Workspace ws, KeyTargets to, Operand da, int64_t tiles,
                               int64_t pieces) {
  const KeyBlock at(p, tiles, pieces, kKeys);
  const Chunk& chunk = at.chunk;
  if (chunk.steps == 0) return;
  Shared shared;
  Tiles x;
  x.q = shared.take<float>(kQ * kKeys);
  x.k = shared.take<float>(kQ * kKeys);
  x.a = shared.take<float>(kQ * kKeys);
  x.dots = shared.take<float>(kQ * kQ);
  x.dots_back = shared.take<float>(p.delta ? kQ * kQ : 1);
  auto* dq = shared.take<float>(kQ * kKeys);
  auto* dk = shared.take<float>(kQ * kKeys);
  auto* ends = shared.take<float>(kQ * kKeys);  // gu
  const int tid = static_cast<int>(threadIdx.x);
  load_columns(p.steps(p.q, chunk, at.group, at.n), chunk.steps, at.keys, 0.0f, x.q);
  load_columns(p.steps(p.k, chunk, at.group, at.n), chunk.steps, at.keys, 0.0f, x.k);
  for (int i = tid; i < kQ * kKeys; i += kLanes) dq[i] = dk[i] = 0.0f;
  for (int64_t head = at.first_head; head < at.end_head; ++head) {
    const int64_t pairs = place(p, chunk.chunk, head, kQ * kQ);
    const auto column_of = [&](const float* array) {
      return own(p, array, chunk.chunk, head, kQ, p.keys, 0, at.n);
    };
    const Source sy = column_of(ws.sy), gu = column_of(ws.gu), sd = column_of(ws.sd);
    __syncthreads();
    load_columns(p.steps(p.a, chunk, head, at.n), chunk.steps, at.keys, 1.0f, x.a);
    load_columns(gu, chunk.steps, at.keys, 0.0f, ends);
    for (int i = tid; i < kQ * kQ; i += kLanes) {
      x.dots[i] = ws.dots[pairs + i];
      if (p.delta) x.dots_back[i] = ws.dots_back[pairs + i];
    }
    __syncthreads();

    const int n = tid % kKeys, first = tid / kKeys;
    if (n < at.keys) {
      float product = 1.0f;  // c_i
      for (int i = 0; i < chunk.steps; ++i) {
        product *= x.a[i * kKeys + n];
        if (i % kGroups != first) continue;
        float& query = dq[i * kKeys + n];
        float& key = dk[i * kKeys + n];
        query += product * sy(i, n);
        if (p.delta) key += product * sd(i, n);
        add_pairs(x, p.delta, i, n, query, key);
      }
      product = 1.0f;  // the tail
      for (int i = chunk.steps - 1; i >= 0; --i) {
        if (i % kGroups == first) dk[i * kKeys + n] += product * ends[i * kKeys + n];
        product *= x.a[i * kKeys + n];
      }
    }
    if (!da.data) continue;

    const int column = tid / 32 * kColumns + lane_of_warp() / kLanesOfColumn;
    const bool inside = column < at.keys;
    float r[kQ / kLanesOfColumn];
#pragma unroll
    for (int s = 0; s < kQ / kLanesOfColumn; ++s) {
      const int i = s * kLanesOfColumn + tid % kLanesOfColumn;
      r[s] = 0.0f;
      if (!inside || i >= chunk.steps) continue;
      r[s] = x.q[i * kKeys + column] * sy(i, column);
      if (p.delta) r[s] += x.k[i * kKeys + column] * sd(i, column);
    }
    const float last = inside ? ws.both[place(p, chunk.chunk, head, p.keys) + at.n + column] : 0.0f;
    decay_column(x, p.delta, column, r, last, ends + column, chunk.steps, inside,
                 p.steps_to(da, chunk, head, at.n + column));
  }
  __syncthreads();
  for (int i = tid; i < kQ * kKeys; i += kLanes) {
    const int step = i / kKeys, n = i % kKeys;
    if (step >= chunk.steps || n >= at.keys) continue;
    at.put(p, to.dq, to.dq_parts, step, n, dq[i]);
    at.put(p, to.dk, to.dk_parts, step, n, dk[i]);
  }
}

}  // namespace

void key_decay_gradients(const CudaStream& stream, const Problem& p, const Workspace& ws,
                         const MatrixScanGradients& g) {
  const int64_t tiles = ceil_div(p.keys, kKeys), pieces = pieces_of(p);
  const int64_t blocks = p.chunks * p.groups * pieces * tiles;
  if (blocks == 0) return;
  const size_t shared = 6 * shared_bytes<float>(kQ * kKeys) + shared_bytes<float>(kQ * kQ) +
                        shared_bytes<float>(p.delta ? kQ * kQ : 1);
  launch(stream, "matrix scan: gradients of keys and their decays", key_decay_gradients_kernel,
         {blocks_of(blocks), kLanes, shared}, p, ws, KeyTargets{g.dq, g.dk, ws.dq, ws.dk}, g.da,
         tiles, pieces);
}

}  // namespace pentad::scan::cuda
