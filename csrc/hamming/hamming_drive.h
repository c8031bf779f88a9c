// SPDX-License-Identifier: Apache-2.0
// What the drivers share: chunks of codes that stay in cache, splitting over threads, merging.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "common/aligned.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "hamming/hamming.h"
#include "hamming/hamming_kernels.h"

namespace pentad::hamming {

constexpr int64_t kChunkBytes = 128 << 10;  // of blocks: half of a small L2 cache
constexpr int64_t kSerialWork = 1 << 18;    // bytes compared below which threads do not pay

// The table of the level in use.
const Kernels& kernels();

inline int64_t words_of(const Database& database) {
  return database.blocks.data ? database.blocks.words : words_for(database.codes.cols);
}

inline int64_t chunk_blocks(int64_t words) {
  return std::max<int64_t>(1, kChunkBytes / (std::max<int64_t>(words, 1) * kBlockRows * 2));
}

// --- Codes ---------------------------------------------------------------------------------------

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

// One bit per row from one byte per row; empty without a mask.
std::vector<uint32_t> live_bits(const uint8_t* mask, int64_t rows);

// --- Splitting -----------------------------------------------------------------------------------

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
    const double work = 2.0 * static_cast<double>(nq) * static_cast<double>(rows * words);
    if (work < static_cast<double>(slices) * kSerialWork)
      slices = 1 + static_cast<int64_t>(work / kSerialWork);
    slices = std::min(slices, std::max<int64_t>(1, ceil_div(rows, kBlockRows)));
    slice_rows = ceil_div(ceil_div(rows, slices), kBlockRows) * kBlockRows;
    slices = slice_rows ? std::max<int64_t>(1, ceil_div(rows, slice_rows)) : 1;
  }
};

// Hit buffers, freed with their owner, or where one of them finds no memory.
class Hits {
 public:
  Hits(int64_t count, int64_t k, uint32_t limit, bool ordered) : buffers_(count) {
    try {
      for (HitBuffer& buffer : buffers_) start_hits(buffer, k, limit, ordered);
    } catch (...) {
      free_all();
      throw;
    }
  }
  ~Hits() { free_all(); }
  Hits(const Hits&) = delete;
  Hits& operator=(const Hits&) = delete;
  HitBuffer* data() { return buffers_.data(); }

 private:
  void free_all() {
    for (HitBuffer& buffer : buffers_) free_hits(buffer);
  }

  std::vector<HitBuffer> buffers_;
};

// Appends the hits of another slice.
void merge(HitBuffer& into, const HitBuffer& from);

// Runs search(first_query, queries, first_row, last_row, hits) for every piece of the plan, then
// write(query, hits) with the k best of each query.
template <class Search, class Write>
void search_topk(const Plan& plan, int64_t nq, int64_t rows, int64_t k, uint32_t limit,
                 bool ordered, const Search& search, const Write& write) {
  std::vector<std::unique_ptr<Hits>> found(plan.groups * plan.slices);
  parallel_for(plan.groups * plan.slices, [&](int64_t task) {
    const int64_t q0 = task / plan.slices * plan.group, count = std::min(plan.group, nq - q0);
    const int64_t row = std::min(rows, task % plan.slices * plan.slice_rows);
    found[task] = std::make_unique<Hits>(count, k, limit, ordered);
    HitBuffer* hits = found[task]->data();
    search(q0, count, row, std::min(rows, row + plan.slice_rows), hits);
    if (plan.slices > 1) return;
    for (int64_t q = 0; q < count; ++q) {
      finish_hits(hits[q]);
      write(q0 + q, hits[q]);
    }
    found[task].reset();  // many groups do not all stay in memory
  });
  if (plan.slices == 1) return;
  parallel_for(nq, [&](int64_t q) {
    const std::unique_ptr<Hits>* slices = &found[q / plan.group * plan.slices];
    HitBuffer& all = slices[0]->data()[q % plan.group];
    // In the order of the rows, so that an ordered buffer stays ordered.
    for (int64_t s = 1; s < plan.slices; ++s) merge(all, slices[s]->data()[q % plan.group]);
    finish_hits(all);
    write(q, all);
  });
}

}  // namespace pentad::hamming
