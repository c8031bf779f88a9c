// SPDX-License-Identifier: Apache-2.0
// Where blocks add the gradients of queries and keys, which the heads of a group share.
#pragma once
#include "scan/matrix_chunk.cuh"

namespace pentad::scan::cuda {

struct KeyTargets {
  Operand dq, dk;              // (b, t, g, n); either may be absent
  float *dq_parts, *dk_parts;  // [piece][b][t][g][n], null for one piece
};

// The block of a chunk, a group, some of its heads and a tile of keys.
struct KeyBlock {
  Chunk chunk;
  int64_t group, piece, first_head, end_head, n, keys;  // keys: from n on

  __device__ KeyBlock(const Problem& p, int64_t tiles, int64_t pieces, int tile) {
    int64_t block = blockIdx.x;
    n = block % tiles * tile, keys = p.keys - n;
    piece = (block /= tiles) % pieces;
    group = (block /= pieces) % p.groups;
    chunk = p.chunk_of(block / p.groups);
    const int64_t heads = p.heads / p.groups;
    first_head = group * heads + heads * piece / pieces;
    end_head = group * heads + heads * (piece + 1) / pieces;
  }
  // Row i of the chunk, column c of the tile, to its place.
  __device__ void put(const Problem& p, const Operand& whole, float* parts, int i, int c,
                      float x) const {
    if (!whole.data) return;
    if (!parts) return p.steps_to(whole, chunk, group, n).put(i, c, x);
    const int64_t t = chunk.first + (p.reverse ? -i : i);
    parts[(((piece * p.batch + chunk.batch) * p.length + t) * p.groups + group) * p.keys + n + c] =
        x;
  }
};

}  // namespace pentad::scan::cuda
