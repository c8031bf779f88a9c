// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward pass share: where rows lie, which tiles of keys a block of
// queries meets, and the keys in packed form.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_kernels.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pentad::attention {

const Kernels& kernels();  // of the level in use

// parallel_for, or a plain loop where the whole problem is a few microseconds' work and waking
// threads would cost more.
void for_tasks(const Problem&, int64_t tasks, const std::function<void(int64_t)>& task);

// The element (b, h, row, 0) of a query-side or a key-side operand.
const void* q_at(const Problem&, const Operand&, int64_t b, int64_t h, int64_t i);
const void* k_at(const Problem&, const Operand&, int64_t b, int64_t kv_head, int64_t j);
Rows q_rows(const Problem&, const Operand&, int64_t b, int64_t h, int64_t first, int64_t count,
            int64_t dim);

// lse or its gradient, f32 or f64, of row (b, h, i); and lse as the kernels take it.
double row_statistic(const Problem&, const Operand&, int64_t b, int64_t h, int64_t i);
void set_row_statistic(const Problem&, const Operand&, int64_t b, int64_t h, int64_t i, double x);
LogSum log_sum(double lse);

// Keys that any query of the sequence may see by its window.
struct KeyRange {
  int64_t begin, end;
};
KeyRange visible_keys(const Problem&, int64_t b);

Rule rule_of(const Problem&, int64_t b, int64_t h);

// The unit sizes of one problem at this level.
struct Shape {
  bool bf16;                   // units are pairs of bf16
  int64_t units, value_units;  // of a row of q or k; of v
  int64_t width, value_width;  // padded to vectors
  int64_t key_rows;            // rows of the pairs form per tile

  explicit Shape(const Problem&);
};

// Whether the rows of a head already are their pairs form: f32, adjacent, whole vectors.
bool is_packed(const Operand&, int64_t dim);

// Keys and values in packed form: of every (sequence, KV head), or of one at a time.
class PackedKeys {
 public:
  // The forms that are wanted: a sum of these.
  enum : int { k_lanes = 1, v_pairs = 2, v_lanes = 4, k_pairs = 8 };

  // Room for all, filled by pack_all(); with one_at_a_time, for the longest, filled by pack_one().
  PackedKeys(const Problem&, const Shape&, int forms, bool one_at_a_time = false);
  void pack_all();
  void pack_one(int64_t b, int64_t kv_head);
  int64_t tiles(int64_t b) const { return first_tile_[b + 1] - first_tile_[b]; }
  const float* get(int form, int64_t b, int64_t kv_head) const;

 private:
  int64_t tile_size(int form) const;
  void pack(int64_t b, int64_t kv_head, int64_t tile);

  const Problem& problem_;
  const Shape& shape_;
  int forms_;
  bool one_at_a_time_;
  std::vector<int64_t> first_tile_;  // [batch + 1], of one head
  Scratch<float> buffers_[4];
};

// A block of queries of one head.
struct QueryBlock {
  int64_t b, h, first, rows;
};
// All of them, at most `most` rows each, inside the blocks of the mask; the longest work first.
std::vector<QueryBlock> query_blocks(const Problem&, int64_t most);

// The parts of tiles [tile_begin, tile_end) that a block of queries meets.
void spans_of(const Problem&, const QueryBlock&, int64_t tile_begin, int64_t tile_end,
              std::vector<Span>& spans);

// The blocks of 64 queries that a tile of keys meets, in the order of the queries.
struct Meeting {
  int64_t first, rows;         // from a multiple of 64 on
  int64_t row_begin, row_end;  // that take part
  Span span;
};
void meetings_of(const Problem&, int64_t b, int64_t h, int64_t tile, std::vector<Meeting>&);

}  // namespace pentad::attention
