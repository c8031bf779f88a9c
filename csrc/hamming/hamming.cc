// SPDX-License-Identifier: Apache-2.0
// Drives the per-level kernels: brings queries into tiles and codes into blocks, splits the work
// over threads, merges. The chunk of codes that all queries of a group visit stays in the L2 cache.
#include "hamming/hamming.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "hamming/hamming_kernels.h"

namespace pentad::hamming {
namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // of blocks: half of a small L2 cache
constexpr int64_t kQueryGroup = 256;        // queries that share one pass over the codes
constexpr int64_t kScoreGroup = 16;         // their tables, 16 KB each at 1024 bits, share the L2
constexpr int64_t kSerialWork = 1 << 18;    // bytes compared below which threads do not pay

const Kernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::hamming_kernels;
    case Isa::v4: return v4::hamming_kernels;
    case Isa::v3: return v3::hamming_kernels;
    default: return v2::hamming_kernels;
#else
    default: return neon::hamming_kernels;
#endif
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t words_of(const Database& database) {
  return database.blocks.data ? database.blocks.words : words_for(database.codes.cols);
}

int64_t chunk_blocks(int64_t words) {
  return std::max<int64_t>(1, kChunkBytes / (std::max<int64_t>(words, 1) * kBlockRows * 2));
}

// --- Queries ---------------------------------------------------------------------------------------

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

// --- Codes -----------------------------------------------------------------------------------------

// Hands out chunks of blocks: slices of a blocked database, or row-major codes interleaved into
// scratch memory of its own.
class Chunks {
 public:
  Chunks(const Database& database, Metric metric)
      : database_(database), words_(words_of(database)), metric_(metric) {
    if (database.blocks.data) return;
    const int64_t blocks = std::min(chunk_blocks(words_), ceil_div(database.rows(), kBlockRows));
    scratch_ = aligned_buffer<uint16_t>(blocks * words_ * kBlockRows);
    if (metric == Metric::jaccard) ones_.resize(blocks * kBlockRows);
  }

  // Rows [first, last) as the codes of a job; first is a multiple of 32.
  void get(int64_t first, int64_t last, ScanJob& job) {
    job.words = words_;
    job.rows = last - first;
    job.first_id = first;
    job.ids = database_.ids ? database_.ids + first : nullptr;
    job.ones = nullptr;
    if (database_.blocks.data) {
      job.blocks = database_.blocks.block(first / kBlockRows);
      if (database_.blocks.ones) job.ones = database_.blocks.ones + first;
      return;
    }
    Matrix<const uint8_t> part = database_.codes;
    part.data = database_.codes.row(first);
    part.rows = last - first;
    kernels().interleave(part, scratch_.get(), 0, words_);
    job.blocks = scratch_.get();
    if (metric_ == Metric::jaccard) {
      kernels().count_ones(scratch_.get(), part.rows, words_, ones_.data());
      job.ones = ones_.data();
    }
  }

 private:
  const Database& database_;
  int64_t words_;
  Metric metric_;
  AlignedBuffer<uint16_t> scratch_;
  std::vector<uint16_t> ones_;
};

// One bit per row from one byte per row.
std::vector<uint32_t> live_bits(const uint8_t* mask, int64_t rows) {
  std::vector<uint32_t> live;
  if (!mask) return live;
  live.resize(ceil_div(rows, kBlockRows));
  for (int64_t b = 0; b < static_cast<int64_t>(live.size()); ++b) {
    const int64_t n = std::min(kBlockRows, rows - b * kBlockRows);
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; ++i)
      bits |= static_cast<uint32_t>(mask[b * kBlockRows + i] != 0) << i;
    live[b] = bits;
  }
  return live;
}

// --- Keys ------------------------------------------------------------------------------------------

// Limits under which every key lies: counts stay below 65,535, costs below infinity.
uint32_t open_limit(Metric metric) {
  return metric == Metric::jaccard ? key_from_float(std::numeric_limits<float>::infinity()) : 65535;
}

void write_value(Metric metric, uint32_t key, void* values, int64_t at) {
  switch (metric) {
    case Metric::hamming: static_cast<int32_t*>(values)[at] = static_cast<int32_t>(key); break;
    case Metric::intersection: static_cast<int32_t*>(values)[at] = 65534 - static_cast<int32_t>(key); break;
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

// --- Splitting -------------------------------------------------------------------------------------

// Queries in groups, rows in slices: enough pieces for the threads, no more. Many queries are split
// by group, so each result is made by one thread; few queries split the rows.
struct Plan {
  int64_t group, groups, slice_rows, slices;

  Plan(int64_t nq, int64_t rows, int64_t words, int64_t max_group) {
    groups = std::max<int64_t>(1, ceil_div(nq, max_group));
    group = std::max<int64_t>(1, ceil_div(nq, groups));
    if (groups > 1) group = ceil_div(group, kMaxTile) * kMaxTile;
    groups = std::max<int64_t>(1, ceil_div(nq, group));
    const int64_t threads = num_threads();
    slices = groups >= 2 * threads ? 1 : ceil_div(threads, groups);
    slices = std::min(slices, 1 + nq * rows * words * 2 / kSerialWork);
    slices = std::min(slices, std::max<int64_t>(1, ceil_div(rows, kBlockRows)));
    slice_rows = ceil_div(ceil_div(rows, slices), kBlockRows) * kBlockRows;
    slices = slice_rows ? std::max<int64_t>(1, ceil_div(rows, slice_rows)) : 1;
  }
};

// Hit buffers of one task, freed with it.
class Hits {
 public:
  Hits(int64_t count, int64_t k, uint32_t limit, bool ordered) : buffers_(count) {
    for (HitBuffer& buffer : buffers_) start_hits(buffer, k, limit, ordered);
  }
  ~Hits() {
    for (HitBuffer& buffer : buffers_) free_hits(buffer);
  }
  Hits(const Hits&) = delete;
  Hits& operator=(const Hits&) = delete;
  HitBuffer* data() { return buffers_.data(); }

 private:
  std::vector<HitBuffer> buffers_;
};

// Moves the hits of every other slice into the first's buffer.
void merge(HitBuffer& into, const HitBuffer& from) {
  for (int64_t i = 0; i < from.size; ++i) {
    if (from.items[i].key >= into.limit) continue;
    if (into.size == into.capacity) make_room(into);
    into.items[into.size++] = from.items[i];
  }
}

// Runs search(first_query, queries, first_row, last_row, hits) for every piece of the plan, then
// write(query, hits) with the k best of each query.
template <class Search, class Write>
void search_topk(const Plan& plan, int64_t nq, int64_t rows, int64_t k, uint32_t limit,
                 bool ordered, const Search& search, const Write& write) {
  std::vector<std::unique_ptr<Hits>> found(plan.groups * plan.slices);
  std::vector<std::atomic<int64_t>> left(plan.groups);
  for (auto& count : left) count.store(plan.slices);
  parallel_for(plan.groups * plan.slices, [&](int64_t task) {
    const int64_t g = task / plan.slices, s = task % plan.slices;
    const int64_t q0 = g * plan.group, count = std::min(plan.group, nq - q0);
    const int64_t row = std::min(rows, s * plan.slice_rows);
    found[task] = std::make_unique<Hits>(count, k, limit, ordered);
    search(q0, count, row, std::min(rows, row + plan.slice_rows), found[task]->data());
    if (left[g].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    // The last slice of the group to end merges it. A slice's equal keys come from larger ids only
    // by accident of the split, so the merge admits ties and the sort decides.
    HitBuffer* first = found[g * plan.slices]->data();
    for (int64_t q = 0; q < count; ++q) {
      HitBuffer& all = first[q];
      if (plan.slices > 1) {
        all.ordered = false;
        all.limit = limit;
        for (int64_t other = 1; other < plan.slices; ++other)
          merge(all, found[g * plan.slices + other]->data()[q]);
      }
      finish_hits(all);
      write(q0 + q, all);
    }
    for (int64_t other = 0; other < plan.slices; ++other) found[g * plan.slices + other].reset();
  });
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
  constexpr int64_t kTaskQueries = 8;
  parallel_for(ceil_div(nq, kTaskQueries), [&](int64_t task) {
    const int64_t q0 = task * kTaskQueries, count = std::min(kTaskQueries, nq - q0);
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

// --- Range search ----------------------------------------------------------------------------------

namespace {

// Keys under this limit are within the radius.
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
      float limit = static_cast<float>(std::min(radius, 2.0));
      if (limit > radius) limit = std::nextafter(limit, 0.0f);
      return key_from_float(limit) + 1;
    }
  }
}

}  // namespace

void RangeResult::collect(const Matrix<const uint8_t>& queries, const Database& database,
                          const Ranges* ranges, double radius) {
  const int64_t words = words_of(database), rows = database.rows();
  queries_ = queries.rows;
  const Plan plan(queries_, rows, words, kQueryGroup);
  slices_ = ranges ? 1 : plan.slices;
  buffers_ = new HitBuffer[std::max<int64_t>(1, queries_ * slices_)];
  for (int64_t i = 0; i < queries_ * slices_; ++i)
    start_hits(buffers_[i], 0, radius_limit(metric_, radius), true);
  const std::vector<uint32_t> live = live_bits(database.mask, rows);
  parallel_for(queries_ ? plan.groups * slices_ : 0, [&](int64_t task) {
    const int64_t g = task % plan.groups, s = task / plan.groups;
    const int64_t q0 = g * plan.group, count = std::min(plan.group, queries_ - q0);
    HitBuffer* hits = buffers_ + s * queries_ + q0;
    if (ranges) {
      scan_ranges(queries, database, *ranges, live, metric_, q0, count, hits);
    } else if (const int64_t first = s * plan.slice_rows; first < rows) {
      Chunks chunks(database, metric_);
      const QueryTiles tiles(queries, q0, count, words, metric_);
      scan_rows(chunks, tiles, live, words, metric_, first, std::min(rows, first + plan.slice_rows),
                hits);
    }
  });
  for (int64_t i = 0; i < queries_ * slices_; ++i) total_ += buffers_[i].size;
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

RangeResult::~RangeResult() {
  for (int64_t i = 0; i < queries_ * slices_; ++i) free_hits(buffers_[i]);
  delete[] buffers_;
}

void RangeResult::write(int64_t* indptr, void* values, int64_t* ids) const {
  int64_t at = 0;
  for (int64_t q = 0; q < queries_; ++q) {
    indptr[q] = at;
    std::vector<Hit> hits;
    for (int64_t s = 0; s < slices_; ++s) {
      const HitBuffer& buffer = buffers_[s * queries_ + q];
      hits.insert(hits.end(), buffer.items, buffer.items + buffer.size);
    }
    std::sort(hits.begin(), hits.end(), [](const Hit& a, const Hit& b) { return a.id < b.id; });
    for (const Hit& hit : hits) {
      ids[at] = hit.id;
      write_value(metric_, hit.key, values, at++);
    }
  }
  indptr[queries_] = at;
}

// --- All pairs ---------------------------------------------------------------------------------------

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

// --- Float queries -----------------------------------------------------------------------------------

namespace {

// table[v] = sum of the four terms +-x that the bits of v select; dimensions past the end are zero.
void fill_tables(const Matrix<const float>& x, int64_t q, int64_t words, float* tables) {
  const float* row = x.row(q);
  // Nibble k of a word: low and high half of its first byte, then of its second; the high half holds
  // the earlier dimensions.
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
  const uint32_t limit = key_from_float(std::numeric_limits<float>::infinity());
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
    for (int64_t i = 0; i < c; ++i) {
      const int64_t row = candidates[q * c + i];
      float& result = out[q * c + i];
      if (row < 0) {
        result = -std::numeric_limits<float>::infinity();
      } else if (dtype == DType::i8) {
        const int8_t* vector = static_cast<const int8_t*>(vectors) + row * x.cols;
        result = kernels().dot_i8(x.row(q), x.col_stride, vector, x.cols) * scale[row];
      } else {
        const uint16_t* vector = static_cast<const uint16_t*>(vectors) + row * x.cols;
        result = kernels().dot_f16(x.row(q), x.col_stride, vector, x.cols);
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

// --- Layout and elementwise --------------------------------------------------------------------------

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

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::f16: case DType::bf16: return 2;
    default: return 1;
  }
}

// Rows per task so that a task moves about 64 K elements.
int64_t rows_per_task(int64_t dim) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, dim)); }

}  // namespace

bool pack(const Rows& x, double threshold, uint8_t* codes) {
  const int64_t bytes = (x.dim + 7) / 8, size = element_size(x.dtype), step = rows_per_task(x.dim);
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
  const int64_t step = rows_per_task(dim), size = element_size(dtype);
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
