// SPDX-License-Identifier: Apache-2.0
// Codes into blocks and back. Layout: code_scan.h.
#include <cstring>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "pq/code_scan.h"

namespace pentad::pq {
namespace {

// The byte that holds the code of `row` (of a block) for subspace m of 4 bits; m & 4: its high
// half.
int64_t byte_of4(int64_t row, int64_t m) { return m / 8 * (kBlockRows * 4) + row * 4 + m % 4; }

}  // namespace

void to_blocks(const Matrix<const uint8_t>& codes, const Layout& layout, int64_t first,
               uint8_t* blocks) {
  const int64_t first_block = first / kBlockRows;
  const int64_t count = ceil_div(first + codes.rows, kBlockRows) - first_block;
  parallel_for(codes.rows ? count : 0, [&](int64_t b) {
    uint8_t* block = blocks + (first_block + b) * layout.block_bytes();
    const int64_t start = (first_block + b) * kBlockRows - first;  // the block's first row
    const int64_t r0 = start < 0 ? -start : 0;
    const int64_t r1 = codes.rows - start < kBlockRows ? codes.rows - start : kBlockRows;
    for (int64_t r = r0; r < r1; ++r) {
      const uint8_t* row = codes.row(start + r);
      if (layout.nbits != 4) {
        for (int64_t m = 0; m < layout.subspaces; ++m)
          block[m * kBlockRows + r] = row[m * codes.col_stride];
        continue;
      }
      for (int64_t m = 0; m < layout.subspaces; ++m) {
        uint8_t& byte = block[byte_of4(r, m)];
        const uint8_t code = row[m * codes.col_stride];
        byte = m & 4 ? static_cast<uint8_t>((byte & 0x0f) | code << 4)
                     : static_cast<uint8_t>((byte & 0xf0) | code);
      }
    }
  });
}

void from_blocks(const Blocks& blocks, const int64_t* positions, int64_t count, uint8_t* codes) {
  const Layout& layout = blocks.layout;
  constexpr int64_t kStep = 1024;
  parallel_for(ceil_div(count, kStep), [&](int64_t task) {
    for (int64_t i = task * kStep; i < count && i < (task + 1) * kStep; ++i) {
      const uint8_t* block = blocks.block(positions[i] / kBlockRows);
      const int64_t r = positions[i] % kBlockRows;
      for (int64_t m = 0; m < layout.subspaces; ++m) {
        const uint8_t byte = block[layout.nbits == 4 ? byte_of4(r, m) : m * kBlockRows + r];
        codes[i * layout.subspaces + m] = layout.nbits != 4 ? byte : m & 4 ? byte >> 4 : byte & 15;
      }
    }
  });
}

}  // namespace pentad::pq
