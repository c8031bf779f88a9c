// SPDX-License-Identifier: Apache-2.0
// The program of float queries by bits: tables of the 16 sums of four terms in shared memory, and
// each lane's rows that look them up, in the order of the CPU and so with its bits.
#pragma once
#include "hamming/hamming_codes.cuh"

namespace pentad::hamming::cuda {

constexpr int kScoreLanes = 256;
constexpr int kScoreBytes = 128;  // of the rows, between two fillings of the tables

using ScoreTable = float[2 * kScoreBytes][16];  // [nibble][its value]: 16 KB

// tables[q] of queries [q_first, q_first + kQueries), of bytes [byte, byte + kScoreBytes) of rows.
template <int kQueries>
__device__ void fill_tables(const Matrix<const float>& x, int64_t q_first, int byte,
                            ScoreTable* tables) {
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * 2 * kScoreBytes; i += kScoreLanes) {
    const int q = i / (2 * kScoreBytes), nibble = i % (2 * kScoreBytes);
    // A byte's low nibble, its later dimensions, comes first.
    const int64_t dim = (byte + nibble / 2) * int64_t{8} + (nibble % 2 ? 0 : 4);
    float term[4];
    for (int j = 0; j < 4; ++j)
      term[j] = dim + j < x.cols && q_first + q < x.rows
                    ? x.data[(q_first + q) * x.row_stride + (dim + j) * x.col_stride]
                    : 0.0f;
    for (int v = 0; v < 16; ++v) {
      float sum = v & 8 ? term[0] : -term[0];
      sum += v & 4 ? term[1] : -term[1];
      sum += v & 2 ? term[2] : -term[2];
      sum += v & 1 ? term[3] : -term[3];
      tables[q][nibble][v] = sum;
    }
  }
}

// sums[q][r] = score(x[q_first + q], codes[rows[r]]) of this lane's rows; 0s past the last row. Where
// the tables of all bytes fit, `filled` says that they are there; ends with a barrier otherwise.
// Limit: shared memory, one load of a table per four dimensions of a pair. The 16 entries of a table
// lie in 16 banks, and the lanes of a warp read one table, so there are no conflicts.
template <int kQueries, int kRows>
__device__ void add_scores(const Matrix<const float>& x, int64_t q_first, const Codes& codes,
                           const int64_t (&rows)[kRows], ScoreTable* tables, bool filled,
                           float (&sums)[kQueries][kRows]) {
  for (int byte = 0; byte < codes.bytes; byte += kScoreBytes) {
    if (!filled) {
      fill_tables<kQueries>(x, q_first, byte, tables);
      __syncthreads();
    }
    for (int p = 0; p < kScoreBytes / 16 && byte + p * 16 < codes.bytes; ++p) {
      uint4 pieces[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) pieces[r] = codes.piece(rows[r], byte / 16 + p);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint4& piece = pieces[r];
          const uint32_t word = w == 0 ? piece.x : w == 1 ? piece.y : w == 2 ? piece.z : piece.w;
#pragma unroll
          for (int nibble = 0; nibble < 8; ++nibble)
#pragma unroll
            for (int q = 0; q < kQueries; ++q)
              sums[q][r] += tables[q][p * 32 + w * 8 + nibble][word >> (4 * nibble) & 15];
        }
      }
    }
    if (!filled) __syncthreads();
  }
}

}  // namespace pentad::hamming::cuda
