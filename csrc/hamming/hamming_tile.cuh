// SPDX-License-Identifier: Apache-2.0
// The tile program of many queries: the common ones of 32 rows of a with 64 rows of b, by the four
// warps of a block, from words that pass through shared memory in two buffers.
//
// |a xor b| = |a| + |b| - 2 |a and b|, so one product serves every metric, and tensor cores have it
// (and.popc is native on sm_80 and sm_90; xor.popc on sm_80 alone).
#pragma once
#include "common/cp_async.cuh"
#include "common/mma.cuh"
#include "hamming/hamming_codes.cuh"

namespace pentad::hamming::cuda {

constexpr int kTileA = 32, kTileB = 64, kTileLanes = 128;
constexpr int kTilePieces = 4;  // of 16 bytes: two steps of 256 bits
constexpr int kPitch = 20;  // words of a row in shared memory: no two lanes of a load share a bank
constexpr int kTileRows = kTileA + kTileB;
constexpr size_t kTileShared = shared_bytes<uint32_t[kPitch]>(2 * kTileRows);

// Lane's pairs: c[j][i] is row a_row(i) of a by row b_row(j, i) of b, both within the tile.
struct TilePairs {
  int32_t c[4][4];

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int a_row(int i) { return warp() % 2 * 16 + lane_of_warp() / 4 + i / 2 * 8; }
  __device__ static int b_row(int j, int i) {
    return warp() / 2 * 32 + j * 8 + lane_of_warp() % 4 * 2 + i % 2;
  }
};

__device__ inline void load_piece(const Codes& codes, int64_t row, int piece, uint32_t* to) {
  if (codes.aligned && row < codes.rows && piece * 16 < codes.bytes)
    cp_async(to, codes.data + row * codes.row_stride + piece * 16);
  else *reinterpret_cast<uint4*>(to) = codes.piece(row, piece);
}

// Begins to bring pieces [4 step, 4 step + 4) of the tile's rows into `buffer`.
__device__ inline void load_tile(const Codes& a, int64_t a_first, const Codes& b, int64_t b_first,
                                 int step, uint32_t (*buffer)[kPitch]) {
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kTilePieces; i += kTileLanes) {
    const int tile_row = i / kTilePieces, slot = i % kTilePieces;
    const int piece = step * kTilePieces + slot;
    uint32_t* to = buffer[tile_row] + slot * 4;
    if (tile_row < kTileA) load_piece(a, a_first + tile_row, piece, to);
    else load_piece(b, b_first + tile_row - kTileA, piece, to);
  }
  cp_async_commit();
}

template <bool kTensor>
__device__ void add_common_ones(const uint32_t (*buffer)[kPitch], TilePairs& pairs) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  if constexpr (kTensor) {
#pragma unroll
    for (int k = 0; k < kTilePieces * 4; k += 8) {  // words
      const uint32_t* first = buffer[TilePairs::a_row(0)] + k;
      const uint32_t* second = buffer[TilePairs::a_row(2)] + k;
      const uint32_t a[4] = {first[t], second[t], first[t + 4], second[t + 4]};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t* row = buffer[kTileA + TilePairs::warp() / 2 * 32 + j * 8 + g] + k;
        const uint32_t b[2] = {row[t], row[t + 4]};
        mma_and_popc(pairs.c[j], a, b);
      }
    }
  } else {
#pragma unroll 4
    for (int k = 0; k < kTilePieces * 4; ++k) {
      const uint32_t a[2] = {buffer[TilePairs::a_row(0)][k], buffer[TilePairs::a_row(2)][k]};
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          pairs.c[j][i] += __popc(a[i / 2] & buffer[kTileA + TilePairs::b_row(j, i)][k]);
    }
  }
}

// All common ones of the tile. Ends with a barrier: `buffers` (2 * kTileRows rows) are free again.
template <bool kTensor>
__device__ TilePairs common_ones(const Codes& a, int64_t a_first, const Codes& b, int64_t b_first,
                                 uint32_t (*buffers)[kPitch]) {
  TilePairs pairs = {};
  const int steps = (a.bytes + kTilePieces * 16 - 1) / (kTilePieces * 16);
  load_tile(a, a_first, b, b_first, 0, buffers);
  for (int step = 0; step < steps; ++step) {
    uint32_t (*now)[kPitch] = buffers + step % 2 * kTileRows;
    if (step + 1 < steps) {
      load_tile(a, a_first, b, b_first, step + 1, buffers + (step + 1) % 2 * kTileRows);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    add_common_ones<kTensor>(now, pairs);
    __syncthreads();
  }
  return pairs;
}

}  // namespace pentad::hamming::cuda
