// SPDX-License-Identifier: Apache-2.0
// Float queries by bits, their transpose, and the rescoring of candidates.
#include <cstring>
#include <limits>

#include "hamming/hamming_drive.h"

namespace pentad::hamming {
namespace {

constexpr int64_t kScoreGroup = 16;  // queries whose tables, 16 KB each at 1024 bits, share the L2

// table[v] = sum of the four terms +-x that the bits of v select; dimensions past the end are zero.
void fill_tables(const Matrix<const float>& x, int64_t q, int64_t words, float* tables) {
  const float* row = x.row(q);
  // Nibble k of a word: low and high half of its first byte, then of its second; the high half
  // holds the earlier dimensions.
  static constexpr int first_dim[4] = {4, 0, 12, 8};
  for (int64_t w = 0; w < words; ++w) {
    for (int k = 0; k < 4; ++k) {
      float term[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t j = w * 16 + first_dim[k] + i;
        term[i] = j < x.cols ? row[j * x.col_stride] : 0.0f;
      }
      float* table = tables + (w * 4 + k) * 16;
      for (int v = 0; v < 16; ++v) {
        float sum = v & 8 ? term[0] : -term[0];
        sum += v & 4 ? term[1] : -term[1];
        sum += v & 2 ? term[2] : -term[2];
        sum += v & 1 ? term[3] : -term[3];
        table[v] = sum;
      }
    }
  }
}

struct ScoreTables {
  AlignedBuffer<float> tables;

  ScoreTables(const Matrix<const float>& x, int64_t first, int64_t count, int64_t words)
      : tables(aligned_buffer<float>(count * words * 64)) {
    for (int64_t q = 0; q < count; ++q)
      fill_tables(x, first + q, words, tables.get() + q * words * 64);
  }
};

}  // namespace

void score(const Matrix<const float>& x, const Matrix<const uint8_t>& codes, float* out) {
  if (x.rows == 0 || codes.rows == 0) return;
  Database database;
  database.codes = codes;
  const int64_t words = words_of(database);
  const Plan plan(x.rows, codes.rows, words * 8, kScoreGroup);
  parallel_for(plan.groups * plan.slices, [&](int64_t task) {
    const int64_t q0 = task / plan.slices * plan.group, count = std::min(plan.group, x.rows - q0);
    const int64_t first = task % plan.slices * plan.slice_rows;
    const int64_t last = std::min(codes.rows, first + plan.slice_rows);
    const ScoreTables tables(x, q0, count, words);
    Chunks chunks(database, Metric::hamming);
    const int64_t step = chunk_blocks(words) * kBlockRows;
    for (int64_t row = first; row < last; row += step) {
      ScanJob chunk;
      chunks.get(row, std::min(last, row + step), chunk);
      kernels().score({chunk.blocks, words, chunk.rows, tables.tables.get(), count,
                       out + q0 * codes.rows + row, codes.rows});
    }
  });
}

void topk_score(const Matrix<const float>& x, const Database& database, int64_t k, float* values,
                int64_t* ids) {
  const int64_t words = words_of(database), rows = database.rows();
  if (x.rows == 0 || k == 0) return;
  const std::vector<uint32_t> live = live_bits(database.mask, rows);
  // A sum of finite terms may overflow, so infinite costs count as hits.
  const uint32_t limit = key_from_float(std::numeric_limits<float>::infinity()) + 1;
  search_topk(
      Plan(x.rows, rows, words * 8, kScoreGroup), x.rows, rows,
      std::max<int64_t>(1, std::min(k, rows)), limit, !database.ids,
      [&](int64_t q0, int64_t count, int64_t first, int64_t last, HitBuffer* hits) {
        if (first == last) return;
        const ScoreTables tables(x, q0, count, words);
        Chunks chunks(database, Metric::hamming);
        const int64_t step = chunk_blocks(words) * kBlockRows;
        const AlignedBuffer<float> scores = aligned_buffer<float>(count * step);
        for (int64_t row = first; row < last; row += step) {
          ScanJob chunk;
          chunks.get(row, std::min(last, row + step), chunk);
          kernels().score(
              {chunk.blocks, words, chunk.rows, tables.tables.get(), count, scores.get(), step});
          for (int64_t q = 0; q < count; ++q)
            kernels().select_largest(scores.get() + q * step, chunk.rows,
                                     live.empty() ? nullptr : live.data() + row / kBlockRows,
                                     chunk.ids, chunk.first_id, hits[q]);
        }
      },
      [&](int64_t q, const HitBuffer& hits) {
        for (int64_t i = 0; i < k; ++i) {
          const bool have = i < hits.size;
          ids[q * k + i] = have ? hits.items[i].id : -1;
          values[q * k + i] = have ? 0.0f - float_from_key(hits.items[i].key)
                                   : -std::numeric_limits<float>::infinity();
        }
      });
}

void score_candidates(const Matrix<const float>& x, const Blocks& blocks, const int64_t* candidates,
                      int64_t c, float* out) {
  parallel_for(x.rows, [&](int64_t q) {
    const ScoreTables tables(x, q, 1, blocks.words);
    for (int64_t i = 0; i < c; ++i) {
      const int64_t row = candidates[q * c + i];
      if (row < 0) {
        out[q * c + i] = -std::numeric_limits<float>::infinity();
        continue;
      }
      const uint16_t* word = blocks.block(row / kBlockRows) + row % kBlockRows;
      const float* table = tables.tables.get();
      float sum = 0.0f;  // in score's order, so the same bits
      uint16_t last = 0;
      for (int64_t w = 0; w < blocks.words; ++w, word += kBlockRows) {
        for (int k = 0; k < 4; ++k, table += 16) sum += table[(*word ^ last) >> (4 * k) & 15];
        last = *word;
      }
      out[q * c + i] = sum;
    }
  });
}

void dot_candidates(const Matrix<const float>& x, const void* vectors, DType dtype,
                    const float* scale, const int64_t* candidates, int64_t c, float* out) {
  parallel_for(x.rows, [&](int64_t q) {
    std::vector<float> query(x.cols);
    for (int64_t j = 0; j < x.cols; ++j) query[j] = x.row(q)[j * x.col_stride];
    for (int64_t i = 0; i < c; ++i) {
      const int64_t row = candidates[q * c + i];
      float& result = out[q * c + i];
      if (row < 0) {
        result = -std::numeric_limits<float>::infinity();
      } else if (dtype == DType::i8) {
        const int8_t* vector = static_cast<const int8_t*>(vectors) + row * x.cols;
        result = kernels().dot_i8(query.data(), vector, x.cols) * scale[row];
      } else {
        const uint16_t* vector = static_cast<const uint16_t*>(vectors) + row * x.cols;
        result = kernels().dot_f16(query.data(), vector, x.cols);
      }
    }
  });
}

void weighted_sum(const WeightedSum& in, float* out) {
  const int64_t q_tiles = ceil_div(in.nq, kSumQueries), columns = ceil_div(in.dim, 64);
  parallel_for(in.batch * q_tiles * columns, [&](int64_t task) {
    const int64_t column = task % columns, tile = task / columns % q_tiles;
    const int64_t b = task / columns / q_tiles, q0 = tile * kSumQueries;
    const int64_t dims = std::min<int64_t>(64, in.dim - column * 64);
    WeightedSumJob job;
    job.weights = in.weights + b * in.weight_strides[0] + q0 * in.weight_strides[1];
    job.weight_stride_q = in.weight_strides[1];
    job.weight_stride_n = in.weight_strides[2];
    job.nq = static_cast<int>(std::min<int64_t>(kSumQueries, in.nq - q0));
    job.codes = in.codes + b * in.code_strides[0] + column * 8 * in.code_strides[2];
    job.code_stride_n = in.code_strides[1];
    job.code_stride_byte = in.code_strides[2];
    job.bytes = static_cast<int>((dims + 7) / 8);
    job.n = in.n;
    alignas(64) float sums[kSumQueries][64];
    kernels().weighted_sum(job, sums);
    for (int q = 0; q < job.nq; ++q)
      std::memcpy(out + ((b * in.nq + q0 + q) * in.dim + column * 64), sums[q],
                  dims * sizeof(float));
  });
}

}  // namespace pentad::hamming
