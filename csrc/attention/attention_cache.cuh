// SPDX-License-Identifier: Apache-2.0
// Where a sequence's keys lie in the caches, found on the device.
#pragma once
#include "attention/attention_cache_cuda.h"
#include "common/cuda_launch.cuh"

namespace pentad::attention::cuda {

// Positions are `int` in the kernels.
constexpr int kMostPositions = (1 << 30) - 1;

// Whether each row begins at a multiple of 16 bytes and its elements are adjacent.
inline bool has_pieces(const Operand& x) {
  const int64_t size = size_of(x.dtype);
  bool aligned = x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && x.stride[i] * size % 16 == 0;
  return aligned;
}

inline int position_of(int64_t x, const char* what) {
  if (x > kMostPositions)
    throw std::invalid_argument("a CUDA kernel cannot take " + std::to_string(x) + " " + what);
  return static_cast<int>(x);
}

__device__ inline int64_t integer_at(const Integers& list, int64_t i) {
  return list.wide ? static_cast<const int64_t*>(list.data)[i * list.stride]
                   : static_cast<const int32_t*>(list.data)[i * list.stride];
}

// Element (outer, h, inner, 0) of k or v.
struct CachePlace {
  int64_t outer;
  int inner;
  bool exists;
};

// One sequence's keys.
struct CachedKeys {
  int length = 0;  // 0 where it is not valid
  bool valid;
  int64_t row;
  int pad = 0;

  // Needs room for `extra` more positions.
  __device__ CachedKeys(const Caches& caches, int64_t b, int64_t extra) : row(b) {
    const int64_t given = integer_at(caches.lengths, b);
    const int64_t first = caches.left_pad.data ? integer_at(caches.left_pad, b) : 0;
    if (caches.rows.data) row = integer_at(caches.rows, b);
    valid = given >= 0 && first >= 0 && given <= caches.capacity && first <= caches.capacity &&
            first + given + extra <= caches.capacity &&
            (caches.table || (row >= 0 && row < caches.cache_rows));
    if (!valid) return;
    length = static_cast<int>(given);
    pad = static_cast<int>(first);
  }

  __device__ CachePlace place(const Caches& caches, int64_t b, int j) const {
    if (!caches.table) return {row, pad + j, true};
    const int size = static_cast<int>(caches.page_size), n = j / size;
    const int64_t page = caches.table[b * caches.table_stride[0] + n * caches.table_stride[1]];
    return {page, j - n * size, page >= 0 && page < caches.cache_rows};
  }
};

}  // namespace pentad::attention::cuda
