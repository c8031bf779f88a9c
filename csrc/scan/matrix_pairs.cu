// SPDX-License-Identifier: Apache-2.0
// Pairs of steps of a chunk, before any state is known.
#include "scan/matrix_chunk.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kBlock = 16;  // of the inverse

// --- The inverse of I + A, A strictly lower -------------------------------------------------------

// a [64][kAlong], of which the part below the diagonal is read -> inverse, and zeros above. `x`: of
// the same size, for what is between. Diagonal blocks by substitution, then one diagonal of blocks
// after the other: T_IJ = - T_II sum_L A_IL T_LJ. No sum goes over zeros of a triangle: what is
// not a number reaches later rows alone.
__device__ void invert(const float* a, float* inverse, float* x) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < kQ * kQ; i += kLanes) inverse[i / kQ * kAlong + i % kQ] = 0.0f;
  __syncthreads();
  if (tid < kQ) {
    const int j = tid, first = tid / kBlock * kBlock;
    inverse[j * kAlong + j] = 1.0f;
    for (int i = j + 1; i < first + kBlock; ++i) {
      float sum = 0.0f;
      for (int l = j; l < i; ++l) sum -= a[i * kAlong + l] * inverse[l * kAlong + j];
      inverse[i * kAlong + j] = sum;
    }
  }
  __syncthreads();
  for (int apart = 1; apart < kQ / kBlock; ++apart) {
    const int elements = (kQ / kBlock - apart) * kBlock * kBlock;
    for (int at = tid; at < elements; at += kLanes) {
      const int i = at / kBlock + apart * kBlock, j = at / (kBlock * kBlock) * kBlock + at % kBlock;
      float sum = 0.0f;
      for (int l = j; l < i / kBlock * kBlock; ++l)
        sum += a[i * kAlong + l] * inverse[l * kAlong + j];
      x[i * kAlong + j] = sum;
    }
    __syncthreads();
    for (int at = tid; at < elements; at += kLanes) {
      const int i = at / kBlock + apart * kBlock, j = at / (kBlock * kBlock) * kBlock + at % kBlock;
      float sum = 0.0f;
      for (int l = i / kBlock * kBlock; l <= i; ++l)
        sum -= inverse[i * kAlong + l] * x[l * kAlong + j];
      inverse[i * kAlong + j] = sum;
    }
    __syncthreads();
  }
}

__device__ void store_tile(const float* tile, float* to) {
  for (int i = static_cast<int>(threadIdx.x); i < kQ * kQ; i += kLanes)
    to[i] = tile[i / kQ * kAlong + i % kQ];
}

// --- One decay per key ----------------------------------------------------------------------------

// q, k (b, t, g, n), a (b, t, h, n) -> q c, k tail, k c [chunk][h][step][n], whole [chunk][h][n].
// Limit: memory, about 24 bytes per step and key. A lane has a column; half of them go backwards.
__global__ void __launch_bounds__(kLanes) decay_rows_kernel(Problem p, Workspace ws) {
  const int64_t tiles = (p.keys + kTile - 1) / kTile;
  const int64_t head = blockIdx.x / tiles % p.heads;
  const Chunk chunk = p.chunk_of(blockIdx.x / tiles / p.heads);
  const int64_t n = blockIdx.x % tiles * kTile + threadIdx.x % kTile;
  if (n >= p.keys) return;
  const Source a = p.steps(p.a, chunk, head, n), k = p.steps(p.k, chunk, p.group(head), n);
  const Source q = p.steps(p.q, chunk, p.group(head), n);
  const int64_t to = place(p, chunk.chunk, head, kQ * p.keys) + n;
  float product = 1.0f;
  if (threadIdx.x < kTile) {
    for (int i = 0; i < kQ; ++i) {
      const bool inside = i < chunk.steps;
      if (inside) product *= a(i, 0);
      ws.q_decayed[to + i * p.keys] = inside ? q(i, 0) * product : 0.0f;
      if (p.delta) ws.k_decayed[to + i * p.keys] = inside ? k(i, 0) * product : 0.0f;
    }
    ws.whole[place(p, chunk.chunk, head, p.keys) + n] = product;
  } else {
    for (int i = kQ - 1; i >= 0; --i) {
      const bool inside = i < chunk.steps;
      ws.k_tail[to + i * p.keys] = inside ? k(i, 0) * product : 0.0f;
      if (inside) product *= a(i, 0);
    }
  }
}

// sums[i] += sum_n x_in M_ij,n k_jn, over half of the tile's columns n; j is the lane's. Tiles are
// [step][kAlong].
__device__ void add_key_pairs(const float* x, const float* k, const float* a, float (&sums)[kQ]) {
  const int j = static_cast<int>(threadIdx.x) % kQ;
  const int first = static_cast<int>(threadIdx.x) / kQ * (kTile / 2);
  for (int n = first; n < first + kTile / 2; ++n) {
    float product = k[j * kAlong + n];
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      if (i > j) product *= a[i * kAlong + n];
      if (i >= j) sums[i] += x[i * kAlong + n] * product;
    }
  }
}

// tile[i][j] = the sum of both halves' sums.
__device__ void gather_pairs(const float (&sums)[kQ], float* tile) {
  const int j = static_cast<int>(threadIdx.x) % kQ;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQ; ++i)
    if (threadIdx.x < kQ) tile[i * kAlong + j] = sums[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQ; ++i)
    if (threadIdx.x >= kQ) tile[i * kAlong + j] += sums[i];
  __syncthreads();
}

// --- Pairs ----------------------------------------------------------------------------------------

// tile[i][j] = w_i or w_j times L_ij, the inverse of I + that to `to`.
__device__ void solve(const float* pairs, const float* w, bool by_row, float* a, float* inverse,
                      float* x, float* to) {
  for (int at = static_cast<int>(threadIdx.x); at < kQ * kQ; at += kLanes) {
    const int i = at / kQ, j = at % kQ;
    a[i * kAlong + j] = i > j ? pairs[i * kAlong + j] * w[by_row ? i : j] : 0.0f;
  }
  __syncthreads();
  invert(a, inverse, x);
  store_tile(inverse, to);
  __syncthreads();
}

// q, k -> pairs [chunk][h][i][j], zeros above the diagonal; with the delta rule the inverses.
// Limit: tensor cores, 64 x 64 x keys (delta: twice that) and a chain of small steps for the
// inverse; one decay per key: the float32 units, 4 operations per key and pair.
template <bool kKeyDecay>
__global__ void __launch_bounds__(kLanes) pairs_kernel(Problem p, Workspace ws) {
  const int64_t head = blockIdx.x % p.heads, group = p.group(head);
  const Chunk chunk = p.chunk_of(blockIdx.x / p.heads);
  Shared shared;
  auto* q = shared.take<float>(kQ * kAlong);
  auto* k = shared.take<float>(kQ * kAlong);
  auto* m = shared.take<float>(kQ * kAlong);  // M, or the decays of a tile of keys
  auto* w = shared.take<float>(kQ);
  Decays decays(shared);
  load_weights(p, chunk, head, w);
  float by_query[kKeyDecay ? kQ : 1] = {}, by_key[kKeyDecay ? kQ : 1] = {};
  Sums<kQ> kq = {}, kk = {};
  for (int64_t n = 0; n < p.keys; n += kTile) {
    const Extent extent{chunk.steps, p.keys - n, chunk.steps};
    __syncthreads();
    load_tile<kTile>(p.steps(p.q, chunk, group, n), chunk.steps, p.keys - n, nullptr, q, kAlong);
    load_tile<kTile>(p.steps(p.k, chunk, group, n), chunk.steps, p.keys - n, nullptr, k, kAlong);
    if constexpr (kKeyDecay)
      load_tile<kTile>(p.steps(p.a, chunk, head, n), chunk.steps, p.keys - n, nullptr, m, kAlong);
    __syncthreads();
    if constexpr (kKeyDecay) {
      add_key_pairs(q, k, m, by_query);
      if (p.delta) add_key_pairs(k, k, m, by_key);
    } else {
      add_product<kQ, false, true>(q, kAlong, k, kAlong, kq, extent);
      if (p.delta) add_product<kQ, false, true>(k, kAlong, k, kAlong, kk, extent);
    }
  }
  float* to = ws.pairs + place(p, chunk.chunk, head, kQ * kQ);
  if constexpr (kKeyDecay) {
    gather_pairs(by_query, q);
    store_tile(q, to);
    if (p.delta) gather_pairs(by_key, k);
  } else {
    decays.load(p, chunk, head);
    decays.products(m, kAlong);
    __syncthreads();
    each<kQ>(kq, [&](int i, int j, float& x) {
      to[i * kQ + j] = i >= j ? m[i * kAlong + j] * x : 0.0f;
    });
    if (p.delta)
      each<kQ>(kk, [&](int i, int j, float& x) {
        k[i * kAlong + j] = i > j ? m[i * kAlong + j] * x : 0.0f;
      });
  }
  if (!p.delta) return;
  __syncthreads();
  auto* x = shared.take<float>(kQ * kAlong);
  const int64_t own = place(p, chunk.chunk, head, kQ * kQ);
  solve(k, w, false, m, q, x, ws.inverse + own);
  if (ws.inverse_back) solve(k, w, true, m, q, x, ws.inverse_back + own);
}

}  // namespace

void decay_rows(const CudaStream& stream, const Problem& p, const Workspace& ws) {
  const int64_t blocks = p.chunks * p.heads * p.key_tiles();
  if (blocks && p.key_decay)
    launch(stream, "matrix scan: decayed rows", decay_rows_kernel, {blocks_of(blocks), kLanes}, p,
           ws);
}

void make_pairs(const CudaStream& stream, const Problem& p, const Workspace& ws) {
  const int64_t blocks = p.chunks * p.heads;
  if (blocks == 0) return;
  const size_t shared = (p.delta ? 4 : 3) * shared_bytes<float>(kQ * kAlong) +
                        shared_bytes<float>(kQ) + Decays::bytes();
  const Grid grid{blocks_of(blocks), kLanes, shared};
  launch(stream, "matrix scan: pairs", p.key_decay ? pairs_kernel<true> : pairs_kernel<false>, grid,
         p, ws);
}

}  // namespace pentad::scan::cuda
