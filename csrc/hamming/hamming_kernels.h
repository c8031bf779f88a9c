// SPDX-License-Identifier: Apache-2.0
// The inner kernels that exist once per instruction-set level (hamming_search_simd.inc), as plain
// structs and function pointers. hamming_search.cc and hamming_score.cc drive them: they, splits over threads and merges.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"
#include "common/topk.h"

namespace pentad::hamming {

// Queries are compared in tiles of 8, 4, 2 and 1; a tile's words lie as uint32 [words / 4][T][4],
// each 16-bit word twice, so that one embedded 32-bit broadcast fills a register.
constexpr int kMaxTile = 8;
static constexpr int tile_width(int64_t queries_left) {
  return queries_left >= 8 ? 8 : queries_left >= 4 ? 4 : queries_left >= 2 ? 2 : 1;
}

// One chunk of blocks against one group of queries.
struct ScanJob {
  const uint16_t* blocks;  // uint16 [blocks][words][32]
  int64_t words;
  int64_t rows;          // valid rows of the chunk
  const uint32_t* live;  // one bit per row, per block; null: all rows
  const uint16_t* ones;  // popcounts, per row (jaccard)
  const int64_t* ids;    // per row; null: first_id + row
  int64_t first_id;
  const uint32_t* queries;  // tiles, see above; xor-prefixed for hamming
  const uint16_t* query_ones;
  int64_t nq;
  HitBuffer* hits;  // per query
};

// As above, all results: out[q * stride + row].
struct DistanceJob {
  ScanJob scan;
  int32_t* out_int;
  float* out_float;  // jaccard
  int64_t stride;
};

// tables: float [nq][words * 4][16]; out[q * stride + row].
struct ScoreJob {
  const uint16_t* blocks;
  int64_t words;
  int64_t rows;
  const float* tables;
  int64_t nq;
  float* out;
  int64_t stride;
};

// Up to kSumQueries rows of weights against 64 dimensions (up to 8 bytes of each code).
constexpr int kSumQueries = 32;
struct WeightedSumJob {
  const float* weights;
  int64_t weight_stride_q, weight_stride_n;
  int nq;
  const uint8_t* codes;  // first byte of the dimensions in question
  int64_t code_stride_n, code_stride_byte;
  int bytes;
  int64_t n;
};

struct Kernels {
  // Brings `count` row-major codes into rows [first, first + count) of the blocked array.
  void (*interleave)(const Matrix<const uint8_t>& codes, uint16_t* blocks, int64_t first,
                     int64_t words);
  // ones[i] = popcount of row i of a blocked array.
  void (*count_ones)(const uint16_t* blocks, int64_t rows, int64_t words, uint16_t* ones);
  void (*scan_hamming)(const ScanJob&);
  void (*scan_intersection)(const ScanJob&);
  void (*scan_jaccard)(const ScanJob&);
  void (*distance_hamming)(const DistanceJob&);
  void (*distance_intersection)(const DistanceJob&);
  void (*distance_jaccard)(const DistanceJob&);
  void (*score)(const ScoreJob&);
  // One row-major query against row-major codes of unit column stride, without blocks.
  void (*row_counts)(const uint8_t* query, const Matrix<const uint8_t>& codes, uint16_t* counts);
  // Appends the rows whose count is under the buffer's limit.
  void (*select_smallest)(const uint16_t* counts, int64_t rows, const uint32_t* live,
                          const int64_t* ids, int64_t first_id, HitBuffer&);
  // Appends the rows whose cost, -value, is under the buffer's limit.
  void (*select_largest)(const float* values, int64_t rows, const uint32_t* live,
                         const int64_t* ids, int64_t first_id, HitBuffer&);
  void (*weighted_sum)(const WeightedSumJob&, float (*out)[64]);
  float (*dot_i8)(const float* x, const int8_t* v, int64_t dim);
  float (*dot_f16)(const float* x, const uint16_t* v, int64_t dim);
  // bits of x[i * stride] > threshold, i < count <= 64, in packbits order; false on a NaN.
  bool (*pack64)(const void* x, DType dtype, int64_t stride, int count, double threshold,
                 uint8_t* bytes);
  void (*unpack)(const uint8_t* code, int64_t stride, int64_t dim, DType dtype, void* out);
};

}  // namespace pentad::hamming

// One table per level that is compiled in.
namespace pentad::v2 {
extern const hamming::Kernels hamming_kernels;
}
namespace pentad::v3 {
extern const hamming::Kernels hamming_kernels;
}
namespace pentad::v4 {
extern const hamming::Kernels hamming_kernels;
}
namespace pentad::v4x {
extern const hamming::Kernels hamming_kernels;
}
namespace pentad::neon {
extern const hamming::Kernels hamming_kernels;
}
