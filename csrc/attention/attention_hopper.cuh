// SPDX-License-Identifier: Apache-2.0
// What Hopper's attention kernels share: tiles of rows in shared memory, their copies, and the fragments
// that four warps multiply. A block is three warpgroups: one copies tiles, two have 64 rows each.
#pragma once
#include "attention/attention_hopper.h"
#include "common/hopper.cuh"
#include "common/mma.cuh"

namespace pentad::attention::cuda {

using hopper::Barrier;
using hopper::kPanel;
using hopper::TileMap;

constexpr int kStages = 2, kConsumers = 2, kConsumerRows = 64;
constexpr int kLanes = (1 + kConsumers) * 128, kConsumerWarps = kConsumers * 4;
constexpr int kBlockRows = kConsumers * kConsumerRows;  // queries, or keys, of a block
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rows of D columns, as panels of 64 columns one behind the other.
template <int kRows, int D>
struct Tile {
  static constexpr int kSize = kRows * D, kPart = kRows * kPanel, kBytes = kSize * 2;

  // By one lane; rows beyond the tensor are zeros.
  __device__ static void copy(uint16_t* tile, const TileMap& map, Barrier* full, int64_t row,
                              int64_t head, int64_t batch) {
    for (int p = 0; p < D / kPanel; ++p)
      hopper::copy_tile(tile + p * kPart, map, full, p * kPanel, static_cast<int>(row),
                        static_cast<int>(head), static_cast<int>(batch));
  }
  // Operands of a product over columns d to d + 15: rows from `first` on.
  __device__ static hopper::Operand rows(const uint16_t* tile, int d, int first = 0) {
    const hopper::Operand panel(tile + d / kPanel * kPart + first * kPanel, 1024);
    return panel.advanced(d % kPanel * 2);
  }
  // Of one over rows r to r + 15: all columns.
  __device__ static hopper::Operand columns(const uint16_t* tile, int r) {
    return hopper::Operand(tile, 1024, kPart * 2).advanced(r * kPanel * 2);
  }
};

// The stage of the n-th tile, and the parity of its use.
struct Use {
  int stage, parity;
  __device__ explicit Use(int n) : stage(n % kStages), parity(n / kStages % 2) {}
};

// A warp's part of the 64 rows, and a lane's of them: rows g and g + 8; columns 2t and 2t + 1 of
// each eight. Number i of a lane's fragment stands in row i / 2 % 2, column i / 4 * 8 + 2t + i % 2.
struct Place {
  int warpgroup, row, t;
  __device__ Place()
      : warpgroup(static_cast<int>(threadIdx.x) / 128 - 1),
        row(warpgroup * kConsumerRows + static_cast<int>(threadIdx.x) / 32 % 4 * 16 +
            lane_of_warp() / 4),
        t(lane_of_warp() % 4) {}
  __device__ int column(int i) const { return i / 4 * 8 + t * 2 + i % 2; }
};

// Columns low to high, numbers small enough for a tile.
struct Seen {
  int low, high;
  __device__ Seen(int64_t low, int64_t high)
      : low(static_cast<int>(min(low, int64_t{kBlockRows}))),
        high(static_cast<int>(max(int64_t{-1}, min(high, int64_t{kBlockRows})))) {}
};

// float32 or float64 numbers, one for each row.
struct Logs {
  void* data;
  bool wide;
  int64_t stride[3];

  explicit Logs(const Operand& x)
      : data(x.data), wide(x.dtype == DType::f64), stride{x.stride[0], x.stride[1], x.stride[2]} {}
  __device__ int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * stride[0] + h * stride[1] + i * stride[2];
  }
  __device__ float get(int64_t b, int64_t h, int64_t i) const {
    return wide ? static_cast<float>(static_cast<const double*>(data)[at(b, h, i)])
                : static_cast<const float*>(data)[at(b, h, i)];
  }
  __device__ void set(int64_t b, int64_t h, int64_t i, float value) const {
    if (wide) static_cast<double*>(data)[at(b, h, i)] = value;
    else static_cast<float*>(data)[at(b, h, i)] = value;
  }
};
inline bool is_logs(const Operand& x) { return x.dtype == DType::f32 || x.dtype == DType::f64; }

// Which keys a query sees, by position.
struct Window {
  int64_t sq, sk, offset, left, right;

  explicit Window(const Problem& p)
      : sq(p.max_q), sk(p.max_k), offset(p.offset(0)), left(p.left), right(p.right) {}
  __device__ int64_t first_key(int64_t query) const {
    return max(int64_t{0}, query + offset - left);
  }
  __device__ int64_t last_key(int64_t query) const { return min(sk - 1, query + offset + right); }
  __device__ int64_t first_query(int64_t key) const {
    return max(int64_t{0}, key - offset - right);
  }
  __device__ int64_t last_query(int64_t key) const { return min(sq - 1, key - offset + left); }

  // Of keys from `key` on those that a query sees, and the other way round.
  __device__ Seen keys_of(int64_t query, int64_t key) const {
    return {first_key(query) - key, last_key(query) - key};
  }
  __device__ Seen queries_of(int64_t key, int64_t query) const {
    return {first_query(key) - query, last_query(key) - query};
  }
};

// Scores count as -inf but for columns low to high of each row, which range(row) says.
template <int kRegisters, class Range>
__device__ void mask(float (&scores)[kRegisters], const Place& place, const Range& range) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Seen seen = range(place.row + half * 8);
#pragma unroll
    for (int i = 0; i < kRegisters; ++i)
      if (i / 2 % 2 == half && (place.column(i) < seen.low || place.column(i) > seen.high))
        scores[i] = -INFINITY;
  }
}

template <bool bf16>
__device__ uint32_t pair_of(float low, float high) {
  return bf16 ? bf16_pair(low, high) : f16_pair(low, high);
}
// A fragment of sums as the first operand of a product over its columns.
template <bool bf16, int kRegisters>
__device__ void to_operand(const float (&from)[kRegisters], uint32_t (&to)[kRegisters / 8][4]) {
#pragma unroll
  for (int k = 0; k < kRegisters / 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[k][i] = pair_of<bf16>(from[k * 8 + i * 2], from[k * 8 + i * 2 + 1]);
}

// A warp's rows of a (rows, D) result with two 16-bit numbers at a time.
template <bool bf16, int D>
__device__ void store_rows(const float (&from)[D / 2], const float (&by)[2], const Place& place,
                           void* to, int64_t first, int64_t rows, int64_t stride) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + place.row + half * 8;
    if (row >= rows) continue;
    auto* pairs = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + row * stride);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      pairs[n * 4 + place.t] =
          pair_of<bf16>(from[n * 4 + half * 2] * by[half], from[n * 4 + half * 2 + 1] * by[half]);
  }
}

// Tiles [first, first + count) of `size` rows that hold rows low to high.
struct Tiles {
  int64_t first;
  int count;
  __device__ Tiles(int64_t low, int64_t high, int size)
      : first(low / size), count(high < low ? 0 : static_cast<int>(high / size - first) + 1) {}
};

// A (B, H, S, D) tensor as the copies have it: D, S, H, B.
struct Shape {
  const void* data;
  int64_t size[4], stride[4];
  Shape(const Operand& x, int64_t batch, int64_t heads, int64_t length, int64_t dim)
      : data(x.data),
        size{dim, length, heads, batch},
        stride{x.stride[3], x.stride[2], x.stride[1], x.stride[0]} {}
};
inline bool can_tile(const Shape& x) { return hopper::can_tile(x.data, x.size, x.stride); }
inline TileMap tile_map(const Shape& x, int rows) {
  return hopper::tile_map(x.data, x.size, x.stride, rows);
}
// Whether store_rows can write it.
inline bool can_store(const Operand& x) {
  bool can = x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
  for (int i = 0; i < 3; ++i) can = can && x.stride[i] % 2 == 0;
  return can;
}

// call(bf16, dim) with both as constants.
template <class Call>
void with_types(const Problem& p, const Call& call) {
  const auto with_dim = [&](auto bf16) {
    if (p.dim == 64) call(bf16, std::integral_constant<int, 64>());
    else call(bf16, std::integral_constant<int, 128>());
  };
  if (p.q.dtype == DType::bf16) with_dim(std::true_type());
  else with_dim(std::false_type());
}

}  // namespace pentad::attention::cuda
