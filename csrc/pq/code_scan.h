// SPDX-License-Identifier: Apache-2.0
// Search over product-quantized codes: the k rows of least asymmetric distance (ADC; Jegou et al.
// 2011, "Product quantization for nearest neighbor search", eq. 13).
//
// A row i is a code c_i of M small integers below K, a query a table T of (M, K) costs:
//
//   cost(i) = ((offset + T[0][c_i0]) + T[1][c_i1]) + ...       float32, in this order
//   cost(i) = bias_i + scale_i * (that sum)                    where rows have factors, scale_i >= 0
//
// (each operation rounded to float32; -0 counts as 0).
//
// Smaller is better; (cost, id) is a total order, ties to the smaller id. T comes from
// score_tables (table_sum.h), negated for inner products. So costs have the same bits at every
// level, thread count and batch size, and the search is exact: it returns what a brute-force scan
// would.
//
// How it is fast: a table of bytes t[m][c] <= (T[m][c] - least_m) / step gives a lower bound of
// every cost in small integers, which the byte shuffles of a register look up 64 at a time. Only
// rows whose bound is under the cost of the k-th best so far are settled by the sum above: about
// one in ten thousand. `step` follows that k-th cost as it falls, so that the bound is fine where
// it matters; sums saturate, which keeps them bounds.
//
// What limits it: 4 bits, one shuffle and one dot product of bytes per 64 lookups (64 lookups a
// cycle on Zen 4 at level v4x); 8 bits, two shuffles of 128 bytes per 64 lookups; one query,
// memory.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"
#include "common/topk.h"

namespace pentad::pq {

constexpr int64_t kMaxSubspaces = 4096;

// --- The blocked layout --------------------------------------------------------------------------
// Rows are grouped in blocks of 64.
//   4 bits:      uint8 block[groups][64][4]: byte j of row r in group g holds subspace 8g + j in its
//                low half and 8g + 4 + j in its high half, so that a register of 16 rows looks up
//                four subspaces in one 64-entry table and sums them by a dot product of bytes.
//                Subspaces beyond M hold code 0.
//   6 and 8 bits: uint8 block[M][64], a byte per code.
// Missing rows are zero.
constexpr int64_t kBlockRows = 64;

// How codes lie: of `nbits` (4, 6 or 8) bits for each of `subspaces`.
struct Layout {
  int nbits = 8;
  int64_t subspaces = 0;

  int64_t entries() const { return int64_t{1} << nbits; }  // K
  int64_t groups() const { return (subspaces + 7) / 8; }
  int64_t block_bytes() const { return kBlockRows * (nbits == 4 ? groups() * 4 : subspaces); }
};

struct Blocks {
  const uint8_t* data = nullptr;
  Layout layout;
  int64_t rows = 0;

  const uint8_t* block(int64_t b) const { return data + b * layout.block_bytes(); }
};

// Writes codes (n, M) as rows [first, first + n) of the blocked array, which has room for whole
// blocks and zeros beyond.
void to_blocks(const Matrix<const uint8_t>& codes, const Layout& layout, int64_t first,
               uint8_t* blocks);
// The codes (count, M) of the rows listed in `positions`, contiguous.
void from_blocks(const Blocks& blocks, const int64_t* positions, int64_t count, uint8_t* codes);

// --- Search --------------------------------------------------------------------------------------
struct Database {
  Blocks blocks;
  const float* scale = nullptr;   // (rows), not negative, and bias; null: no factors
  const float* bias = nullptr;    // (rows)
  const uint8_t* mask = nullptr;  // (rows), nonzero: may be returned; null: all may
  const int64_t* ids = nullptr;   // (rows), any order; null: the row number
};

// What every query searches: the rows of the ranges [offsets[q], offsets[q + 1]), each
// [begin[i], end[i]) with begin a multiple of kBlockRows, by table table[i] (null: q) and with
// offset[i] (null: 0). Without ranges: all rows, by table q.
struct Ranges {
  const int64_t* offsets = nullptr;
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;
  const int64_t* table = nullptr;
  const float* offset = nullptr;
};

// tables (any, used, K), contiguous; `used` <= layout.subspaces searches by the first ones alone.
struct Queries {
  const float* tables = nullptr;
  int64_t count = 0, used = 0;
  const float* offset = nullptr;  // (count), without ranges; null: 0
};

// values and ids (queries.count, k), contiguous. Where fewer than k rows qualify the id is -1 and
// the value +inf.
void topk(const Queries& queries, const Database& database, const Ranges* ranges, int64_t k,
          float* values, int64_t* ids);

// Every row of cost <= radius, ids rising in each query's run.
class RangeResult {
 public:
  RangeResult(const Queries& queries, const Database& database, const Ranges* ranges, float radius);

  int64_t total() const { return total_; }
  int64_t queries() const { return queries_; }
  // indptr (queries + 1), values (total), ids (total)
  void write(int64_t* indptr, float* values, int64_t* ids) const;

 private:
  std::vector<std::vector<Hit>> hits_;  // per slice of the rows and query
  int64_t queries_ = 0, slices_ = 1, total_ = 0;
};

}  // namespace pentad::pq
