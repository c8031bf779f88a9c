// SPDX-License-Identifier: Apache-2.0
// Matrix states on a device, in chunks of 64 steps (matrix_chunk_simd.inc has the mathematics):
//
//   forward   pairs (all chunks at once), states (chunk after chunk), outputs (all at once)
//   backward  pairs; with the delta rule its errors; the states' gradients (chunk after chunk, from
//             the last); gradients of values, of states, of keys and of decays (all at once)
//
// The delta rule's system is solved by its inverse, e = (I + L W)^-1 (v - c S^T k), u = w e, where
// L_ij = M_ij (k_i . k_j), j < i; backward D = ((I + W L)^-1)^T of what reaches u.
//
// With one decay per key, M, c and the tail are vectors over the keys. Then q c, k tail and k c are
// made first, and all products with states are those of one decay per head without decays; the
// pairs' sums over keys are not products of matrices and run on the float32 units.
#pragma once
#include "scan/matrix_scan_cuda.h"
#include "scan/matrix_tiles.cuh"

namespace pentad::scan::cuda {

constexpr int kQ = static_cast<int>(kMatrixChunk);
static_assert(kQ == kTile);

// --- Problems and their chunks --------------------------------------------------------------------

// One sequence: `steps` steps from time `first` on, back in time if reversed; `chunk`: its first.
struct Steps {
  int64_t sequence, batch, first, steps, chunk;

  __device__ int64_t chunks() const { return (steps + kQ - 1) / kQ; }
};
struct Chunk {
  int64_t batch, first, chunk;
  int steps;
};

// MatrixScan for a device.
struct Problem {
  int64_t batch, length, heads, groups, keys, values, sequences, chunks;
  bool delta, reverse, key_decay;
  float scale;
  Operand q, k, v, a, w, d, initial;
  Integers begin;

  Problem(const MatrixScan& p, const Packed& packed);

  int64_t key_tiles() const { return ceil_div(keys, kTile); }
  int64_t value_tiles() const { return ceil_div(values, kTile); }

  // Whatever stands in the list, the pieces of the length that lie within it.
  __device__ int64_t boundary(int64_t s) const {
    const int64_t at = begin.wide ? static_cast<const int64_t*>(begin.data)[s * begin.stride]
                                  : static_cast<const int32_t*>(begin.data)[s * begin.stride];
    return max(int64_t{0}, min(at, length));
  }
  __device__ Steps steps_of(int64_t s) const {
    Steps piece{s, s, 0, length, s * ((length + kQ - 1) / kQ)};
    if (begin.data) {
      const int64_t first = boundary(s), end = max(first, boundary(s + 1));
      piece = {s, 0, first, end - first, first / kQ + s};
    }
    if (reverse) piece.first += piece.steps - 1;
    return piece;
  }
  __device__ Chunk chunk_of(const Steps& s, int64_t n) const {
    const int64_t t = n * kQ;
    return {s.batch, s.first + (reverse ? -t : t), s.chunk + n,
            static_cast<int>(min(int64_t{kQ}, s.steps - t))};
  }
  // Of all sequences; between two packed ones there may be one without steps.
  __device__ Chunk chunk_of(int64_t chunk) const {
    int64_t s = 0;
    if (!begin.data) {
      s = chunk / ((length + kQ - 1) / kQ);
    } else {
      for (int64_t end = sequences; s + 1 < end;) {  // the last that begins here or before
        const int64_t middle = (s + end) / 2;
        if (boundary(middle) / kQ + middle <= chunk) s = middle;
        else end = middle;
      }
    }
    const Steps piece = steps_of(s);
    const int64_t n = chunk - piece.chunk;
    if (n < 0 || n >= piece.chunks()) return {0, 0, chunk, 0};
    return chunk_of(piece, n);
  }

  // (b, t, index, column) over the steps of a chunk.
  template <class Rows>
  __device__ Rows rows(const Operand& x, const Chunk& c, int64_t index, int64_t column) const {
    return {
        x.data, x.dtype,
        c.batch * x.stride[0] + c.first * x.stride[1] + index * x.stride[2] + column * x.stride[3],
        reverse ? -x.stride[1] : x.stride[1], x.stride[3]};
  }
  __device__ Source steps(const Operand& x, const Chunk& c, int64_t index,
                          int64_t column = 0) const {
    return rows<Source>(x, c, index, column);
  }
  __device__ Target steps_to(const Operand& x, const Chunk& c, int64_t index,
                             int64_t column = 0) const {
    return rows<Target>(x, c, index, column);
  }
  __device__ int64_t group(int64_t head) const { return head / (heads / groups); }
};

// What kernels hand to each other, floats; of each chunk and head:
struct Workspace {
  float *states, *gradients;              // [n][p], before and after the chunk
  float* pairs;                           // [i][j]: M_ij (q_i . k_j)
  float *inverse, *inverse_back;          // [i][j]: (I + L W)^-1, (I + W L)^-1
  float *errors, *d_errors;               // [step][p]: e, D
  float *q_decayed, *k_tail, *k_decayed;  // one decay per key: [step][n]
  float* whole;                           // [n]: the decay over the whole chunk
  float *dots, *dots_back;                // [i][j]: u_j . y_i, - u_j . w_i D_i
  float *sy, *gu, *sd;                    // [step][n]: S y_i, G u_j, - S w_i D_i
  float* both;                            // [n]: <S, G>, row by row
  float* dd;                              // [p]
  float *dq, *dk;                         // [piece][b][t][g][n], where there are several pieces
  int64_t bytes;

  Workspace(const Problem& p, bool backward, bool stored, void* memory);
};

// Heads of a group whose dq and dk are added in one block.
constexpr int64_t kHeadsOfPiece = 6;
inline int64_t pieces_of(const Problem& p) {
  return p.heads ? ceil_div(p.heads / p.groups, kHeadsOfPiece) : 1;
}

// Place of (chunk, head, ...) among [chunk][head][count].
__device__ inline int64_t place(const Problem& p, int64_t chunk, int64_t head, int64_t count) {
  return (chunk * p.heads + head) * count;
}
// [row][column] of a chunk and head, from `column` on.
__device__ inline Source own(const Problem& p, const float* x, int64_t chunk, int64_t head,
                             int64_t rows, int64_t columns, int64_t row, int64_t column) {
  return {x, DType::f32, place(p, chunk, head, rows * columns) + row * columns + column, columns,
          1};
}

// --- Decays of one head over a chunk --------------------------------------------------------------

struct Decays {
  float *a, *c, *tail;  // [kQ]: a_i; a_0 ... a_i; those after i

  __device__ explicit Decays(Shared& shared)
      : a(shared.take<float>(kQ)), c(shared.take<float>(kQ)), tail(shared.take<float>(kQ)) {}
  static size_t bytes() { return 3 * shared_bytes<float>(kQ); }

  // Ones where there are none, and where they are in the rows already. Barriers around.
  __device__ void load(const Problem& p, const Chunk& chunk, int64_t head) {
    const int i = static_cast<int>(threadIdx.x) % kQ;
    __syncthreads();
    const bool given = p.a.data && !p.key_decay && i < chunk.steps;
    if (threadIdx.x < kQ) a[i] = given ? p.steps(p.a, chunk, head)(i, 0) : 1.0f;
    __syncthreads();
    float product = 1.0f;
    if (threadIdx.x < kQ) {
      for (int t = 0; t <= i; ++t) product *= a[t];
      c[i] = product;
    } else {
      for (int t = kQ - 1; t > i; --t) product *= a[t];
      tail[i] = product;
    }
    __syncthreads();
  }
  // m[i][j] = M_ij, where i >= j.
  __device__ void products(float* m, int step) const {
    const int j = static_cast<int>(threadIdx.x) % kQ;
    const int first = max(j, static_cast<int>(threadIdx.x) / kQ * (kQ / 2));
    const int end = (static_cast<int>(threadIdx.x) / kQ + 1) * (kQ / 2);
    float product = 1.0f;
    for (int t = j + 1; t <= first; ++t) product *= a[t];
    for (int i = first; i < end; ++i) {
      if (i > first) product *= a[i];
      m[i * step + j] = product;
    }
  }
};

// w of the chunk, zeros behind its steps. A barrier is due.
__device__ inline void load_weights(const Problem& p, const Chunk& chunk, int64_t head, float* w) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kQ) return;
  if (i >= chunk.steps) w[i] = 0.0f;
  else w[i] = p.w.data ? p.steps(p.w, chunk, head)(i, 0) : 1.0f;
}

// Of y = scale do. A barrier is due.
__device__ inline void load_scale(float scale, float* factor) {
  if (threadIdx.x < kQ) factor[threadIdx.x] = scale;
}

// Rows of keys and queries with their decays: the array, and what each row is multiplied by.
struct Decayed {
  Source x;
  const float* factor;
};
__device__ inline Decayed decayed(const Problem& p, const Chunk& chunk, int64_t head, int64_t n,
                                  const Operand& plain, const float* by_key, const float* factor) {
  if (p.key_decay) return {own(p, by_key, chunk.chunk, head, kQ, p.keys, 0, n), nullptr};
  return {p.steps(plain, chunk, p.group(head), n), factor};
}
// k up to the end of the chunk; q and k from its begin.
__device__ inline Decayed tail_keys(const Problem& p, const Workspace& ws, const Chunk& chunk,
                                    int64_t head, int64_t n, const Decays& decays) {
  return decayed(p, chunk, head, n, p.k, ws.k_tail, decays.tail);
}
__device__ inline Decayed early_keys(const Problem& p, const Workspace& ws, const Chunk& chunk,
                                     int64_t head, int64_t n, const Decays& decays) {
  return decayed(p, chunk, head, n, p.k, ws.k_decayed, decays.c);
}
__device__ inline Decayed early_queries(const Problem& p, const Workspace& ws, const Chunk& chunk,
                                        int64_t head, int64_t n, const Decays& decays) {
  return decayed(p, chunk, head, n, p.q, ws.q_decayed, decays.c);
}
// The decay of row n of the state over the chunk.
__device__ inline float whole_decay(const Problem& p, const Workspace& ws, const Chunk& chunk,
                                    int64_t head, int64_t n, const Decays& decays) {
  if (!p.key_decay) return decays.c[kQ - 1];
  return n < p.keys ? ws.whole[place(p, chunk.chunk, head, p.keys) + n] : 0.0f;
}

// What is written before its weight: v, or e of the delta rule.
__device__ inline Source written(const Problem& p, const Workspace& ws, const Chunk& chunk,
                                 int64_t head, int64_t column) {
  if (p.delta) return own(p, ws.errors, chunk.chunk, head, kQ, p.values, 0, column);
  return p.steps(p.v, chunk, head, column);
}

// --- Steps of both passes (each puts one kernel on the stream) -------------------------------------

// matrix_pairs.cu
void decay_rows(const CudaStream&, const Problem&, const Workspace&);
void make_pairs(const CudaStream&, const Problem&, const Workspace&);
// matrix_states.cu: the states, or from the last chunk their gradients.
struct StateWalk {
  Operand d_out;       // backward
  Operand start, end;  // (sequence, h, n, p); either may be absent
  bool backward;
};
void walk_states(const CudaStream&, const Problem&, const Workspace&, const StateWalk&);
// matrix_values.cu
void make_outputs(const CudaStream&, const Problem&, const Workspace&, const Operand& out);
void make_errors(const CudaStream&, const Problem&, const Workspace&, const Operand& d_out);
void value_gradients(const CudaStream&, const Problem&, const Workspace&,
                     const MatrixScanGradients&);
// matrix_keys.cu, matrix_key_decays.cu
void state_gradients(const CudaStream&, const Problem&, const Workspace&, const Operand& d_out);
void key_gradients(const CudaStream&, const Problem&, const Workspace&, const MatrixScanGradients&);
void decay_gradients(const CudaStream&, const Problem&, const Workspace&, const Operand& da);
void add_key_pieces(const CudaStream&, const Problem&, const Workspace&,
                    const MatrixScanGradients&);
void key_decay_gradients(const CudaStream&, const Problem&, const Workspace&,
                         const MatrixScanGradients&);

}  // namespace pentad::scan::cuda
