// SPDX-License-Identifier: Apache-2.0
// The tile program of the SPLADE head: products of 128 rows of a with 128 rows of b, both running
// along the inner dimension, by the 8 warps of a block. Three buffers in shared memory: while one is
// multiplied, the next two are under way. 16-bit floats are multiplied by tensor cores, float32 by
// multiply-adds, 64 sums a lane either way.
#pragma once
#include "common/mma.cuh"
#include "sparse/elements.cuh"

namespace pentad::sparse::cuda {

constexpr int kTile = 128, kTileLanes = 256;
constexpr int kPieces = 4;  // of 16 bytes, of a row and step
constexpr int kPitch = 5;   // pieces of a row in shared memory: no two rows of a load share a bank
constexpr int kStages = 3;
constexpr int kBufferRows = 2 * kTile;
constexpr int kGroups = 16;  // of lanes that have the same columns of a tile, or the same rows
using TileRow = uint4[kPitch];
constexpr size_t kTileShared = shared_bytes<TileRow>(kStages * kBufferRows);

// Blocks of a multiprocessor. Two have 128 registers a lane, in which tensor cores' sums and fragments
// fit; the operands of multiply-adds spill there.
template <class T>
constexpr int kTileBlocks = std::is_same_v<T, float> ? 1 : 2;

// A lane has 8 rows of a and 8 of b, at(i, j) the product of two.
template <class T>
struct TileSums {
  float c[4][4][4] = {};  // by 16 rows of a, 8 rows of b, and as mma.cuh has them

  __device__ float at(int i, int j) const { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ static int row(int i) {
    return warp() / 4 * 64 + i / 2 * 16 + i % 2 * 8 + lane_of_warp() / 4;
  }
  __device__ static int col(int j) {
    return warp() % 4 * 32 + j / 2 * 8 + j % 2 + lane_of_warp() % 4 * 2;
  }
  // Which of the lanes with these columns it is.
  __device__ static int group() { return warp() / 4 * 8 + lane_of_warp() / 4; }

  __device__ void add(const TileRow* a, const TileRow* b) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
      uint32_t left[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        ldmatrix(left[m], &a[warp() / 4 * 64 + m * 16 + lane % 16][k + lane / 16]);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t both[4];
        ldmatrix(both, &b[warp() % 4 * 32 + n * 8 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2]);
        const uint32_t right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if constexpr (std::is_same_v<T, __half>) mma_f16(c[m][n + half], left[m], right[half]);
            else mma_bf16(c[m][n + half], left[m], right[half]);
          }
      }
    }
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
};

template <>
struct TileSums<float> {
  float c[8][8] = {};

  __device__ float at(int i, int j) const { return c[i][j]; }
  __device__ static int row(int i) { return i * 16 + group(); }
  __device__ static int col(int j) { return j * 16 + static_cast<int>(threadIdx.x) % 16; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) / 16; }

  __device__ void add(const TileRow* a, const TileRow* b) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      float4 right[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) right[j] = *reinterpret_cast<const float4*>(&b[col(j)][k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 left = *reinterpret_cast<const float4*>(&a[row(i)][k]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          c[i][j] += left.x * right[j].x;
          c[i][j] += left.y * right[j].y;
          c[i][j] += left.z * right[j].z;
          c[i][j] += left.w * right[j].w;
        }
      }
    }
  }
};

// For each tile in turn, finish(tile, sums) with the products of its rows: row r of a is at the offset
// a_row(tile, r), row r of b at b_row(r), or nowhere. Steps of one tile and the next follow each
// other without a pause. Every lane of the block calls this.
template <class T, class ARow, class BRow, class Finish>
__device__ void tile_products(int64_t tiles, const Operand<T>& a, const ARow& a_row,
                              const Operand<T>& b, const BRow& b_row, TileRow* buffers,
                              const Finish& finish) {
  constexpr int kDepth = kPieces * Operand<T>::kPiece;  // of a step
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t steps = max(int64_t{1}, (a.dim + kDepth - 1) / kDepth);
  int64_t load_tile = 0, load_step = 0;
  int load_stage = 0;
  const auto load = [&] {
    if (load_tile < tiles) {
      TileRow* to = buffers + load_stage * kBufferRows;
      for (int i = tid; i < kTile * kPieces; i += kTileLanes) {
        const int row = i / kPieces, piece = i % kPieces;
        const int64_t at = load_step * kDepth + piece * Operand<T>::kPiece;
        a.copy_piece(a_row(load_tile, row), at, &to[row][piece]);
        b.copy_piece(b_row(row), at, &to[kTile + row][piece]);
      }
      if (++load_step == steps) ++load_tile, load_step = 0;
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) load();
  int stage = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    TileSums<T> sums;
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this buffer is there for all, and nobody reads the one before it
      load();
      const TileRow* now = buffers + stage * kBufferRows;
      sums.add(now, now + kTile);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    finish(tile, sums);
  }
  cp_async_wait<0>();
}

}  // namespace pentad::sparse::cuda
