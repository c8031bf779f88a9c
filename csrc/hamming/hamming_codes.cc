// SPDX-License-Identifier: Apache-2.0
// The blocked layout, and what works on one code at a time.
#include <atomic>

#include "hamming/hamming_drive.h"

namespace pentad::hamming {

void to_blocks(const Matrix<const uint8_t>& codes, uint16_t* blocks, uint16_t* ones, int64_t first,
               int64_t words) {
  constexpr int64_t kTask = 4096;
  // Pieces end at block borders, so that no two threads write into one block.
  const int64_t border = first / kTask * kTask, last = first + codes.rows;
  parallel_for(codes.rows ? ceil_div(last - border, kTask) : 0, [&](int64_t task) {
    const int64_t from = std::max(first, border + task * kTask);
    const int64_t to = std::min(last, border + (task + 1) * kTask);
    Matrix<const uint8_t> part = codes;
    part.data = codes.row(from - first);
    part.rows = to - from;
    kernels().interleave(part, blocks, from, words);
    if (!ones) return;
    const int64_t block = from / kBlockRows;
    std::vector<uint16_t> counts(to - block * kBlockRows);
    kernels().count_ones(blocks + block * words * kBlockRows, to - block * kBlockRows, words,
                         counts.data());
    std::copy(counts.begin() + (from - block * kBlockRows), counts.end(), ones + from);
  });
}

void from_blocks(const Blocks& blocks, const int64_t* positions, int64_t count,
                 const Matrix<uint8_t>& codes) {
  constexpr int64_t kTask = 4096;
  parallel_for(ceil_div(count, kTask), [&](int64_t task) {
    for (int64_t i = task * kTask; i < std::min(count, (task + 1) * kTask); ++i) {
      const int64_t row = positions[i];
      const uint16_t* word = blocks.block(row / kBlockRows) + row % kBlockRows;
      uint8_t* out = codes.row(i);
      for (int64_t j = 0; j < codes.cols; ++j) {
        const int64_t w = j / 2;
        const int bits = word[w * kBlockRows] ^ (w ? word[(w - 1) * kBlockRows] : 0);
        out[j * codes.col_stride] = static_cast<uint8_t>(bits >> (j % 2 * 8));
      }
    }
  });
}

namespace {

// Rows per task so that a task moves about 64 K elements.
int64_t rows_per_task(int64_t dim) {
  return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, dim));
}

}  // namespace

bool pack(const Rows& x, double threshold, uint8_t* codes) {
  const int64_t bytes = (x.dim + 7) / 8, size = size_of(x.dtype), step = rows_per_task(x.dim);
  std::atomic<bool> clean{true};
  parallel_for(ceil_div(x.rows, step), [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(x.rows, (task + 1) * step); ++i) {
      const char* row = static_cast<const char*>(x.data) + x.offsets[i] * size;
      for (int64_t j = 0; j < x.dim; j += 64)
        if (!kernels().pack64(row + j * x.stride * size, x.dtype, x.stride,
                              static_cast<int>(std::min<int64_t>(64, x.dim - j)), threshold,
                              codes + i * bytes + j / 8))
          clean.store(false, std::memory_order_relaxed);
    }
  });
  return clean;
}

void unpack(const Rows& codes, int64_t dim, DType dtype, void* out) {
  const int64_t step = rows_per_task(dim), size = size_of(dtype);
  parallel_for(ceil_div(codes.rows, step), [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(codes.rows, (task + 1) * step); ++i)
      kernels().unpack(static_cast<const uint8_t*>(codes.data) + codes.offsets[i], codes.stride,
                       dim, dtype, static_cast<char*>(out) + i * dim * size);
  });
}

void permute(const Rows& codes, int64_t dim, int64_t shift, uint8_t* out) {
  if (dim == 0) return;
  const int64_t bytes = (dim + 7) / 8, step = rows_per_task(dim);
  shift = (shift % dim + dim) % dim;
  parallel_for(ceil_div(codes.rows, step), [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(codes.rows, (task + 1) * step); ++i) {
      const uint8_t* code = static_cast<const uint8_t*>(codes.data) + codes.offsets[i];
      // `count` <= 8 bits from bit j on, none past dim.
      const auto read = [&](int64_t j, int count) -> unsigned {
        const unsigned two = code[j / 8 * codes.stride] << 8 |
                             (j % 8 + count > 8 ? code[(j / 8 + 1) * codes.stride] : 0);
        return two >> (16 - j % 8 - count) & ((1u << count) - 1);
      };
      for (int64_t byte = 0; byte < bytes; ++byte) {
        const int count = static_cast<int>(std::min<int64_t>(8, dim - byte * 8));
        int64_t from = byte * 8 - shift;
        if (from < 0) from += dim;
        unsigned bits = 0;
        int have = 0;
        while (have < count) {  // more than one piece where the rotation wraps
          const int take = static_cast<int>(std::min<int64_t>(count - have, dim - from));
          bits = bits << take | read(from, take);
          have += take;
          from = from + take == dim ? 0 : from + take;
        }
        out[i * bytes + byte] = static_cast<uint8_t>(bits << (8 - count));
      }
    }
  });
}

}  // namespace pentad::hamming
