// SPDX-License-Identifier: Apache-2.0
// Search: brings queries into tiles, scans chunks of codes that stay in the L2 cache with all
// queries of a group, and merges what the threads found.
#include <cmath>
#include <limits>

#include "hamming/hamming_drive.h"

namespace pentad::hamming {
namespace {

constexpr int64_t kQueryGroup = 256;  // queries that share one pass over the codes
constexpr int64_t kRangesGroup = 8;   // queries of one task where each visits rows of its own

// --- Queries -------------------------------------------------------------------------------------

// A group of queries as the kernels want them (hamming_kernels.h), and their popcounts.
struct QueryTiles {
  AlignedBuffer<uint32_t> words;
  std::vector<uint16_t> ones;
  int64_t count;

  QueryTiles(const Matrix<const uint8_t>& queries, int64_t first, int64_t n, int64_t word_count,
             Metric metric)
      : words(aligned_buffer<uint32_t>(n * word_count)), ones(n), count(n) {
    std::vector<uint16_t> word(word_count);
    for (int64_t q0 = 0; q0 < n;) {
      const int width = tile_width(n - q0);
      uint32_t* tile = words.get() + q0 * word_count;
      for (int t = 0; t < width; ++t) {
        std::fill(word.begin(), word.end(), 0);
        const uint8_t* row = queries.row(first + q0 + t);
        int total = 0;
        for (int64_t j = 0; j < queries.cols; ++j) {
          const unsigned byte = row[j * queries.col_stride];
          word[j / 2] |= byte << (j % 2 * 8);
          total += __builtin_popcount(byte);
        }
        ones[q0 + t] = static_cast<uint16_t>(total);
        uint16_t prefix = 0;
        for (int64_t w = 0; w < word_count; ++w) {
          const uint16_t value = metric == Metric::hamming ? prefix ^= word[w] : word[w];
          tile[(w / 4 * width + t) * 4 + w % 4] = value * 0x10001u;
        }
      }
      q0 += width;
    }
  }
};

// --- Keys ----------------------------------------------------------------------------------------

// Limits under which every key lies: counts stay below 65,535, costs below infinity.
uint32_t open_limit(Metric metric) {
  return metric == Metric::jaccard ? key_from_float(std::numeric_limits<float>::infinity()) : 65535;
}

void write_value(Metric metric, uint32_t key, void* values, int64_t at) {
  switch (metric) {
    case Metric::hamming: static_cast<int32_t*>(values)[at] = static_cast<int32_t>(key); break;
    case Metric::intersection:
      static_cast<int32_t*>(values)[at] = 65534 - static_cast<int32_t>(key);
      break;
    case Metric::jaccard: static_cast<float*>(values)[at] = float_from_key(key); break;
  }
}

void write_missing(Metric metric, void* values, int64_t at) {
  switch (metric) {
    case Metric::hamming:
      static_cast<int32_t*>(values)[at] = std::numeric_limits<int32_t>::max();
      break;
    case Metric::intersection: static_cast<int32_t*>(values)[at] = -1; break;
    case Metric::jaccard:
      static_cast<float*>(values)[at] = std::numeric_limits<float>::infinity();
      break;
  }
}

void scan(const ScanJob& job, Metric metric) {
  switch (metric) {
    case Metric::hamming: return kernels().scan_hamming(job);
    case Metric::intersection: return kernels().scan_intersection(job);
    case Metric::jaccard: return kernels().scan_jaccard(job);
  }
}

// --- Scanning ------------------------------------------------------------------------------------

// Few queries against row-major codes: see "Plain rows" in hamming_search_simd.inc.
bool scans_plainly(const Database& database, Metric metric, int64_t nq) {
  return !database.blocks.data && metric == Metric::hamming && nq <= 2 &&
         database.codes.col_stride == 1;
}

void scan_plainly(const Database& database, const Matrix<const uint8_t>& queries, int64_t q0,
                  int64_t count, const std::vector<uint32_t>& live, int64_t first, int64_t last,
                  HitBuffer* hits) {
  constexpr int64_t kStep = 1024;
  alignas(64) uint16_t counts[kStep] = {};
  std::vector<uint8_t> query(queries.cols);
  for (int64_t row = first; row < last; row += kStep) {
    Matrix<const uint8_t> part = database.codes;
    part.data = database.codes.row(row);
    part.rows = std::min(kStep, last - row);
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t j = 0; j < queries.cols; ++j)
        query[j] = queries.row(q0 + q)[j * queries.col_stride];
      kernels().row_counts(query.data(), part, counts);
      kernels().select_smallest(counts, part.rows,
                                live.empty() ? nullptr : live.data() + row / kBlockRows,
                                database.ids ? database.ids + row : nullptr, row, hits[q]);
    }
  }
}

void scan_rows(Chunks& chunks, const QueryTiles& tiles, const std::vector<uint32_t>& live,
               int64_t words, Metric metric, int64_t first, int64_t last, HitBuffer* hits) {
  ScanJob job{};
  job.queries = tiles.words.get();
  job.query_ones = tiles.ones.data();
  job.nq = tiles.count;
  job.hits = hits;
  const int64_t step = chunk_blocks(words) * kBlockRows;
  for (int64_t row = first; row < last; row += step) {
    chunks.get(row, std::min(last, row + step), job);
    job.live = live.empty() ? nullptr : live.data() + row / kBlockRows;
    scan(job, metric);
  }
}

}  // namespace

void topk(const Matrix<const uint8_t>& queries, const Database& database, Metric metric, int64_t k,
          void* values, int64_t* ids) {
  const int64_t words = words_of(database), rows = database.rows(), nq = queries.rows;
  const auto write = [&](int64_t q, const HitBuffer& hits) {
    for (int64_t i = 0; i < k; ++i) {
      ids[q * k + i] = i < hits.size ? hits.items[i].id : -1;
      if (i < hits.size) write_value(metric, hits.items[i].key, values, q * k + i);
      else write_missing(metric, values, q * k + i);
    }
  };
  const int64_t keep = std::max<int64_t>(1, std::min(k, rows));
  if (nq == 0 || k == 0) return;
  const std::vector<uint32_t> live = live_bits(database.mask, rows);
  search_topk(
      Plan(nq, rows, words, kQueryGroup), nq, rows, keep, open_limit(metric), !database.ids,
      [&](int64_t q0, int64_t count, int64_t first, int64_t last, HitBuffer* hits) {
        if (first == last) return;
        if (scans_plainly(database, metric, nq))
          return scan_plainly(database, queries, q0, count, live, first, last, hits);
        Chunks chunks(database, metric);
        const QueryTiles tiles(queries, q0, count, words, metric);
        scan_rows(chunks, tiles, live, words, metric, first, last, hits);
      },
      write);
}

namespace {

// Visits the ranges of each query of [q0, q0 + count), one query at a time.
void scan_ranges(const Matrix<const uint8_t>& queries, const Database& database,
                 const Ranges& ranges, const std::vector<uint32_t>& live, Metric metric, int64_t q0,
                 int64_t count, HitBuffer* hits) {
  const int64_t words = words_of(database);
  Chunks chunks(database, metric);
  for (int64_t q = 0; q < count; ++q) {
    const QueryTiles tile(queries, q0 + q, 1, words, metric);
    for (int64_t i = ranges.offsets[q0 + q]; i < ranges.offsets[q0 + q + 1]; ++i)
      scan_rows(chunks, tile, live, words, metric, ranges.begin[i], ranges.end[i], hits + q);
  }
}

}  // namespace

void topk_ranges(const Matrix<const uint8_t>& queries, const Database& database,
                 const Ranges& ranges, Metric metric, int64_t k, void* values, int64_t* ids) {
  const int64_t rows = database.rows(), nq = queries.rows;
  if (nq == 0 || k == 0) return;
  const int64_t keep = std::max<int64_t>(1, std::min(k, rows));
  const std::vector<uint32_t> live = live_bits(database.mask, rows);
  parallel_for(ceil_div(nq, kRangesGroup), [&](int64_t task) {
    const int64_t q0 = task * kRangesGroup, count = std::min(kRangesGroup, nq - q0);
    Hits found(count, keep, open_limit(metric), false);
    scan_ranges(queries, database, ranges, live, metric, q0, count, found.data());
    for (int64_t q = 0; q < count; ++q) {
      HitBuffer& hits = found.data()[q];
      finish_hits(hits);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at = (q0 + q) * k + i;
        ids[at] = i < hits.size ? hits.items[i].id : -1;
        if (i < hits.size) write_value(metric, hits.items[i].key, values, at);
        else write_missing(metric, values, at);
      }
    }
  });
}

// --- Range search --------------------------------------------------------------------------------

uint32_t radius_limit(Metric metric, double radius) {
  if (std::isnan(radius)) return 0;
  switch (metric) {
    case Metric::hamming:
      return radius < 0 ? 0 : static_cast<uint32_t>(std::min(65534.0, std::floor(radius))) + 1;
    case Metric::intersection:  // 65534 - count <= 65534 - radius
      return radius > 65534 ? 0 : 65535 - static_cast<uint32_t>(std::max(0.0, std::ceil(radius)));
    default: {
      if (radius < 0) return 0;
      // The largest float <= radius, then one further for the strict comparison.
      float limit = static_cast<float>(std::min(radius, 2.0)) + 0.0f;  // never -0
      if (limit > radius) limit = std::nextafter(limit, 0.0f);
      return key_from_float(limit) + 1;
    }
  }
}

void RangeResult::collect(const Matrix<const uint8_t>& queries, const Database& database,
                          const Ranges* ranges, double radius) {
  const int64_t words = words_of(database), rows = database.rows();
  queries_ = queries.rows;
  Plan plan(queries_, rows, words, kQueryGroup);
  if (ranges) {  // each query has rows of its own to visit
    plan.group = kRangesGroup;
    plan.groups = ceil_div(queries_, plan.group);
    plan.slices = 1;
  }
  slices_ = plan.slices;
  hits_ = std::make_unique<Hits>(queries_ * slices_, 0, radius_limit(metric_, radius), true);
  HitBuffer* buffers = hits_->data();
  const std::vector<uint32_t> live = live_bits(database.mask, rows);
  parallel_for(queries_ ? plan.groups * slices_ : 0, [&](int64_t task) {
    const int64_t g = task % plan.groups, s = task / plan.groups;
    const int64_t q0 = g * plan.group, count = std::min(plan.group, queries_ - q0);
    HitBuffer* hits = buffers + s * queries_ + q0;
    if (ranges) {
      scan_ranges(queries, database, *ranges, live, metric_, q0, count, hits);
    } else if (const int64_t first = s * plan.slice_rows; first < rows) {
      Chunks chunks(database, metric_);
      const QueryTiles tiles(queries, q0, count, words, metric_);
      scan_rows(chunks, tiles, live, words, metric_, first, std::min(rows, first + plan.slice_rows),
                hits);
    }
  });
  for (int64_t i = 0; i < queries_ * slices_; ++i) total_ += buffers[i].size;
}

RangeResult::RangeResult(const Matrix<const uint8_t>& queries, const Database& database,
                         Metric metric, double radius)
    : metric_(metric) {
  collect(queries, database, nullptr, radius);
}

RangeResult::RangeResult(const Matrix<const uint8_t>& queries, const Database& database,
                         const Ranges& ranges, Metric metric, double radius)
    : metric_(metric) {
  collect(queries, database, &ranges, radius);
}

RangeResult::~RangeResult() = default;

void RangeResult::write(int64_t* indptr, void* values, int64_t* ids) const {
  indptr[0] = 0;
  for (int64_t q = 0; q < queries_; ++q) {
    indptr[q + 1] = indptr[q];
    for (int64_t s = 0; s < slices_; ++s) indptr[q + 1] += hits_->data()[s * queries_ + q].size;
  }
  parallel_for(queries_, [&](int64_t q) {
    std::vector<Hit> hits;
    for (int64_t s = 0; s < slices_; ++s) {
      const HitBuffer& buffer = hits_->data()[s * queries_ + q];
      hits.insert(hits.end(), buffer.items, buffer.items + buffer.size);
    }
    std::sort(hits.begin(), hits.end(), [](const Hit& a, const Hit& b) { return a.id < b.id; });
    int64_t at = indptr[q];
    for (const Hit& hit : hits) {
      ids[at] = hit.id;
      write_value(metric_, hit.key, values, at++);
    }
  });
}

// --- All pairs -----------------------------------------------------------------------------------

void distance(const Matrix<const uint8_t>& a, const Matrix<const uint8_t>& b, Metric metric,
              void* out) {
  if (a.rows == 0 || b.rows == 0) return;
  Database database;
  database.codes = b;
  const int64_t words = words_of(database);
  const int64_t step = chunk_blocks(words) * kBlockRows;
  const int64_t chunk_count = ceil_div(b.rows, step);
  const int64_t groups = ceil_div(a.rows, kQueryGroup);
  parallel_for(groups * chunk_count, [&](int64_t task) {
    const int64_t q0 = task / chunk_count * kQueryGroup, row = task % chunk_count * step;
    const int64_t count = std::min(kQueryGroup, a.rows - q0);
    Chunks chunks(database, metric);
    const QueryTiles tiles(a, q0, count, words, metric);
    DistanceJob job{};
    chunks.get(row, std::min(b.rows, row + step), job.scan);
    job.scan.queries = tiles.words.get();
    job.scan.query_ones = tiles.ones.data();
    job.scan.nq = count;
    job.stride = b.rows;
    const int64_t at = q0 * b.rows + row;
    if (metric == Metric::jaccard) job.out_float = static_cast<float*>(out) + at;
    else job.out_int = static_cast<int32_t*>(out) + at;
    if (metric == Metric::hamming) kernels().distance_hamming(job);
    else if (metric == Metric::intersection) kernels().distance_intersection(job);
    else kernels().distance_jaccard(job);
  });
}

}  // namespace pentad::hamming
