// SPDX-License-Identifier: Apache-2.0
// Binary codes: packing, distances, search, float-by-bits scores.
//
// A code is a row of `bytes` bytes in numpy.packbits order: bit j of a vector is bit 7 - j % 8 of
// byte j / 8, and padding bits are zero. With a, b in {0,1}^dim, |a| the number of ones and
// s(b) = 2b - 1 in {-1,+1}^dim:
//
//   hamming(a, b) = |a xor b|                     smaller is better, int32
//   and(a, b)     = |a and b|                     larger is better, int32
//   jaccard(a, b) = (|a or b| - |a and b|) / |a or b|, 0 where both are empty; smaller is better.
//                   One correctly rounded float32 division of integers: the same bits everywhere.
//   score(x, b)   = sum_j x_j s(b)_j              larger is better, float32
//   weighted_sum(w, B)_j = sum_i w_i s(B_i)_j     the transpose of score in B
//
// Error budget: the integer metrics are exact. score adds dim / 4 table entries, each a sum of four
// terms, in one fixed order, so its error is at most (dim / 4 + 3) eps sum_j |x_j|, and the same at
// every level, thread count and batch size. weighted_sum adds runs of 64 codes, then the runs.
//
// Every search has a total order, (value, id) with ties to the smaller id, so results do not depend
// on threads or batching. What limits the kernels: many queries, the vector ALU (2.6 instructions
// per 512 bits of a pair, see hamming_search_simd.inc); one query, memory bandwidth.
#pragma once
#include <cstdint>
#include <memory>

#include "common/tensor_view.h"
#include "common/topk.h"

namespace pentad::hamming {

enum class Metric : int { hamming, jaccard, intersection };

// Counts are kept in 16-bit lanes; 65,472 = 4092 words of 16 bits, and every key stays below
// 65,535.
constexpr int64_t kMaxBytes = 8184;

// --- The blocked layout --------------------------------------------------------------------------
// Rows are grouped in blocks of 32. Word w (16 bits, the bytes 2w and 2w + 1) of the block's 32
// codes stands together: uint16 block[words][32]. So one 64-byte row is one zmm register with a
// lane per code, a tile of queries is compared with it without any horizontal sum, and one
// comparison checks 32 results. `words` is a multiple of four.
//
// A row holds not word w itself but the xor of the words 0..w of each code: the parity of differing
// bits, which the scan needs after every word, is then one xor away (hamming_search_simd.inc), and
// the word is the xor of two rows. Words past the code's end repeat the last; missing rows are
// zero.
constexpr int64_t kBlockRows = 32;
inline int64_t words_for(int64_t bytes) { return (bytes + 7) / 8 * 4; }

struct Blocks {
  const uint16_t* data = nullptr;
  const uint16_t* ones = nullptr;  // popcount of each row; needed by jaccard only
  int64_t rows = 0;
  int64_t words = 0;

  const uint16_t* block(int64_t b) const { return data + b * words * kBlockRows; }
};

// Writes codes as rows [first, first + codes.rows) of the blocked array (which has room for whole
// blocks and zeros beyond), and their popcounts to ones[first...] unless it is null.
void to_blocks(const Matrix<const uint8_t>& codes, uint16_t* blocks, uint16_t* ones, int64_t first,
               int64_t words);
// The row-major codes of the rows listed in `positions`, (count, bytes).
void from_blocks(const Blocks& blocks, const int64_t* positions, int64_t count,
                 const Matrix<uint8_t>& codes);

// --- What is searched ----------------------------------------------------------------------------
// Either row-major codes, which are brought into blocks chunk by chunk on the way, or blocks.
struct Database {
  Matrix<const uint8_t> codes;  // used where blocks.data is null
  Blocks blocks;
  const uint8_t* mask = nullptr;  // (rows), nonzero: may be returned; null: all may
  const int64_t* ids = nullptr;   // (rows), any order; null: the row number

  int64_t rows() const { return blocks.data ? blocks.rows : codes.rows; }
};

// A set of half-open row ranges per query, for searches that visit a part of the rows (IVF): query
// q visits ranges [begin[i], end[i]) for i in [offsets[q], offsets[q + 1]). Each begin is a
// multiple of kBlockRows.
struct Ranges {
  const int64_t* offsets = nullptr;
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;
};

// --- Entries -------------------------------------------------------------------------------------
// values (int32, or float32 for jaccard) and ids are (queries.rows, k), contiguous. Where fewer
// than k rows qualify the id is -1 and the value INT32_MAX, +inf or (intersection) -1.
void topk(const Matrix<const uint8_t>& queries, const Database& database, Metric metric, int64_t k,
          void* values, int64_t* ids);
void topk_ranges(const Matrix<const uint8_t>& queries, const Database& database,
                 const Ranges& ranges, Metric metric, int64_t k, void* values, int64_t* ids);

// Sort keys (common/topk.h) of what lies within the radius are smaller: of distances the distance
// itself, of common ones 65534 less them, of jaccard key_from_float.
uint32_t radius_limit(Metric metric, double radius);

class Hits;

// Everything at distance <= radius (intersection: >= radius), ids rising in each query's run.
class RangeResult {
 public:
  RangeResult(const Matrix<const uint8_t>& queries, const Database& database, Metric metric,
              double radius);
  // As above, within the ranges that each query visits.
  RangeResult(const Matrix<const uint8_t>& queries, const Database& database, const Ranges& ranges,
              Metric metric, double radius);
  ~RangeResult();
  RangeResult(const RangeResult&) = delete;

  int64_t total() const { return total_; }
  int64_t queries() const { return queries_; }
  Metric metric() const { return metric_; }
  // indptr (queries + 1), values (total; int32 or float32), ids (total)
  void write(int64_t* indptr, void* values, int64_t* ids) const;

 private:
  void collect(const Matrix<const uint8_t>& queries, const Database& database, const Ranges* ranges,
               double radius);

  std::unique_ptr<Hits> hits_;  // one buffer per (slice, query)
  int64_t queries_ = 0, slices_ = 1, total_ = 0;
  Metric metric_;
};

// out (a.rows, b.rows), contiguous: int32, or float32 for jaccard.
void distance(const Matrix<const uint8_t>& a, const Matrix<const uint8_t>& b, Metric metric,
              void* out);

// x (nq, dim), codes (n, ceil(dim / 8)) -> out (nq, n), contiguous.
void score(const Matrix<const float>& x, const Matrix<const uint8_t>& codes, float* out);
// The k largest scores; values and ids (nq, k), contiguous; missing: -inf and -1.
void topk_score(const Matrix<const float>& x, const Database& database, int64_t k, float* values,
                int64_t* ids);
// scores of the listed rows only: candidates (nq, c) row numbers, negative ones score -inf.
void score_candidates(const Matrix<const float>& x, const Blocks& blocks, const int64_t* candidates,
                      int64_t c, float* out);

// weights (batch, nq, n), codes (batch, n, bytes) -> out (batch, nq, dim), contiguous.
struct WeightedSum {
  const float* weights;
  int64_t weight_strides[3];
  const uint8_t* codes;
  int64_t code_strides[3];
  int64_t batch, nq, n, dim;
};
void weighted_sum(const WeightedSum& in, float* out);

// Stored vectors for rescoring: out[q][i] = scale[row] * sum_j x[q][j] vectors[row][j] with row =
// candidates[q][i]; int8, or float16 with scale null. Negative candidates score -inf.
void dot_candidates(const Matrix<const float>& x, const void* vectors, DType dtype,
                    const float* scale, const int64_t* candidates, int64_t c, float* out);

// Element (row, j) of x at data + offset(row) + j * stride, in elements; rows are given by index so
// that any leading shape works.
struct Rows {
  const void* data;
  DType dtype;
  const int64_t* offsets;  // (rows)
  int64_t rows, dim, stride;
};
// codes (x.rows, ceil(dim / 8)), contiguous: bit = x > threshold. Returns false where a NaN was
// met.
bool pack(const Rows& x, double threshold, uint8_t* codes);
// codes: u8 rows -> out (rows, dim) contiguous, of dtype, +-1.
void unpack(const Rows& codes, int64_t dim, DType dtype, void* out);
// out (rows, bytes): bit (j + shift) mod dim of the output is bit j of the input.
void permute(const Rows& codes, int64_t dim, int64_t shift, uint8_t* out);

}  // namespace pentad::hamming
