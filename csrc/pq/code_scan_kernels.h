// SPDX-License-Identifier: Apache-2.0
// The inner kernels of the search over codes that exist once per instruction-set level
// (code_scan_simd.inc), as plain structs and function pointers. code_scan.cc drives them.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::pq {

// Subspaces whose bytes a kernel may sum in eight bits, saturating at 255, before it widens.
constexpr int kByteGroup = 16;
constexpr int kScratchBlocks = 8;

// Lower bounds of a chunk of blocks for some queries. Query q has byte tables [padded M][K] at
// tables[q], M padded to a multiple of 8 by zeros, and passes the rows r of block b whose sum
//
//   sum_m table[m][code_m], each run of kByteGroup subspaces cut off at 255 (unless !saturates4),
//
// is at most limit[q]: pass[q * pass_stride + b] has bit r set. With factors it passes rows of
//
//   low = bias_r + scale_r * (base[q] + step[q] * sum),   low - 2^-20 (|bias_r| + |low|) <= most[q].
struct BoundJob {
  const uint8_t* blocks;
  int64_t count;  // blocks
  int64_t block_bytes;
  int64_t used;  // subspaces
  const uint8_t* const* tables;
  int nq;
  const uint32_t* limit;
  const float* scale;  // (count * 64), or null: 1
  const float* bias;   // (count * 64), or null: no factors
  const float* step;   // per query, with factors
  const float* base;
  const float* most;
  // For 4 bits kScratchBlocks * padded used * 64 bytes, for 8 bits used * 256 * lanes8, or null.
  uint8_t* scratch;
  uint64_t* pass;
  int64_t pass_stride;
  // (count * 64), or null: also the sums themselves, cut off at 65535; of one query, no factors.
  uint16_t* sums;
};

// Exact costs of listed rows of 4-bit codes by one table (used, 16), from starts[i] on: see
// code_scan.h.
struct CostJob {
  const uint8_t* blocks;
  int64_t block_bytes;
  int64_t used;
  const float* table;
  const int64_t* rows;
  const float* starts;
  int64_t count;
  float* out;
};

struct CodeScanKernels {
  bool saturates4;  // whether bound4 cuts runs off
  int lanes8;       // queries that bound8 takes side by side, for which it needs scratch; or 0
  void (*bound4)(const BoundJob&);
  void (*bound6)(const BoundJob&);
  void (*bound8)(const BoundJob&);
  // least and most of table (entries).
  void (*extent)(const float* table, int64_t entries, float* least, float* most);
  // out[i] = min(255, floor((table[i] - least) * inverse)), where inverse is a little under 1 /
  // step.
  void (*to_bytes)(const float* table, int64_t entries, float least, float inverse, uint8_t* out);
  void (*cost4)(const CostJob&);
  // Of one stored vector (n), int8 with its scale or float16 with 1: rescore.h.
  float (*stored_score)(const float* x, const void* vector, DType dtype, float scale, int64_t n,
                        bool l2);
};

}  // namespace pentad::pq

// One table per level that is compiled in.
namespace pentad::v2 {
extern const pq::CodeScanKernels code_scan_kernels;
}
namespace pentad::v3 {
extern const pq::CodeScanKernels code_scan_kernels;
}
namespace pentad::v4 {
extern const pq::CodeScanKernels code_scan_kernels;
}
namespace pentad::v4x {
extern const pq::CodeScanKernels code_scan_kernels;
}
namespace pentad::neon {
extern const pq::CodeScanKernels code_scan_kernels;
}
