// SPDX-License-Identifier: Apache-2.0
// Decoding: the query rows of a KV head (its group's heads times the queries) against its keys,
// which stay where they are, in pages or not. The keys are split over tasks; each leaves a partial
// softmax (maximum, sum, weighted values), and these are merged in the order of the keys. How they
// are split depends on the shape alone.
#include "attention/attention_few.h"

#include <cmath>
#include <limits>

#include "attention/attention_drive.h"

namespace pentad::attention {
namespace {

// Up to this many rows; more where there are few KV heads to share out and many keys.
constexpr int64_t kFewRowsOfMany = 16, kMostFewRows = 64;
constexpr int64_t kFewHeads = 4, kManyKeys = 1024;
constexpr int64_t kTasks = 64;      // that splitting aims at
constexpr int64_t kLeastTiles = 4;  // of a split: 256 keys

// One split of one KV head: m, l [rows] and o [rows][width].
struct Partials {
  int64_t rows, width, splits;
  Scratch<float> data;

  float* m(int64_t b_head, int64_t split) const {
    return data.get() + (b_head * splits + split) * rows * (width + 2);
  }
  float* l(int64_t b_head, int64_t split) const { return m(b_head, split) + rows; }
  float* o(int64_t b_head, int64_t split) const { return m(b_head, split) + 2 * rows; }
};

void attend(const Problem& p, const Shape& shape, int64_t b, int64_t kv_head, int64_t tile_begin,
            int64_t tile_end, float* m, float* l, float* o, int64_t width) {
  const int64_t group = p.group(), queries = p.q_len(b), rows = group * queries;
  const int64_t element = size_of(p.q.dtype);
  std::vector<Rule> rules(group);
  for (int64_t g = 0; g < group; ++g) rules[g] = rule_of(p, b, kv_head * group + g);
  const void* q_each[kMostFewRows];
  const Rule* rule_each[kMostFewRows];
  int64_t positions[kMostFewRows];
  for (int64_t r = 0; r < rows; ++r) {
    q_each[r] = q_at(p, p.q, b, kv_head * group + r / queries, r % queries);
    rule_each[r] = &rules[r / queries];
    positions[r] = r % queries;
    // The sink is a key without a value that the first split saw.
    const bool sink = rule_each[r]->has_sink && tile_begin == 0;
    m[r] = sink ? rule_each[r]->sink * static_cast<float>(kLog2e)
                : -std::numeric_limits<float>::infinity();
    l[r] = sink && m[r] != -std::numeric_limits<float>::infinity() ? 1.0f : 0.0f;
  }
  std::fill_n(o, rows * width, 0.0f);
  const Scratch<float> q = Scratch<float>(rows * shape.units);
  kernels().pack_rows({nullptr, q_each, p.q.dtype, 0, p.q.stride[3], rows, p.dim}, shape.bf16,
                      q.get());

  const KeyRange keys = visible_keys(p, b);
  const void *k_rows[2][kTile], *v_rows[kTile];
  const auto find = [&](const Operand& x, int64_t tile, const void** each) {
    const int64_t end = std::min<int64_t>(kTile, keys.end - tile * kTile);
    const bool strided = p.page_size == 0;
    const int64_t step = x.stride[2] * element;
    for (int64_t c = 0; c < end; ++c)
      each[c] = strided && c > 0 ? static_cast<const char*>(each[c - 1]) + step
                                 : k_at(p, x, b, kv_head, tile * kTile + c);
    return end;
  };
  tile_begin = std::max(tile_begin, keys.begin / kTile);
  tile_end = std::min(tile_end, ceil_div(keys.end, kTile));
  int64_t next_end = tile_begin < tile_end ? find(p.k, tile_begin, k_rows[tile_begin & 1]) : 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t end = next_end;
    find(p.v, tile, v_rows);
    FewJob job{};
    if (tile + 1 < tile_end) {
      next_end = find(p.k, tile + 1, k_rows[(tile + 1) & 1]);
      job.next_k_rows = k_rows[(tile + 1) & 1];
      job.next_count = next_end;
    }
    job.fetch = true;
    job.dim = p.dim;
    job.value_dim = p.value_dim;
    job.dtype = p.k.dtype;
    job.tile = tile;
    job.k_rows = k_rows[tile & 1];
    job.v_rows = v_rows;
    job.begin = std::max<int64_t>(0, keys.begin - tile * kTile);
    job.end = end;
    for (int64_t r = 0; r < rows; r += kFewRows) {
      job.rows = static_cast<int>(std::min<int64_t>(kFewRows, rows - r));
      job.rules = rule_each + r;
      job.positions = positions + r;
      job.q = q.get() + r * shape.units;
      job.m = m + r;
      job.l = l + r;
      job.o = o + r * width;
      kernels().few[shape.bf16](job);
      job.fetch = false;  // the next rows of queries find all in cache
      job.next_count = 0;
    }
  }
}

}  // namespace

bool serves_few(const Problem& p) {
  const bool split = p.batch * p.kv_heads <= kFewHeads && p.max_k >= kManyKeys;
  return p.max_q * p.group() <= (split ? kMostFewRows : kFewRowsOfMany) && !p.mask &&
         p.k.stride[3] == 1 && p.v.stride[3] == 1;
}

void forward_few(const Problem& p, const Outputs& out) {
  const Shape shape(p);
  const int64_t pairs = p.batch * p.kv_heads, group = p.group();
  const int64_t tiles = std::max<int64_t>(1, ceil_div(p.max_k, kTile));
  const int64_t per_split =
      std::max(kLeastTiles, ceil_div(tiles, std::max<int64_t>(1, ceil_div(kTasks, pairs))));
  Partials partials{p.max_q * group, padded(p.value_dim, kTile), ceil_div(tiles, per_split), {}};
  partials.data = Scratch<float>(pairs * partials.splits * partials.rows * (partials.width + 2));
  const auto merge = [&](int64_t pair) {
    const int64_t b = pair / p.kv_heads, kv_head = pair % p.kv_heads, queries = p.q_len(b);
    std::vector<float> sum(p.value_dim);
    for (int64_t r = 0; r < group * queries; ++r) {
      float m = -std::numeric_limits<float>::infinity(), l = 0.0f;
      for (int64_t s = 0; s < partials.splits; ++s)
        if (!(partials.m(pair, s)[r] <= m)) m = partials.m(pair, s)[r];  // NaN stays
      const float base = m == -std::numeric_limits<float>::infinity() ? 0.0f : m;
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t s = 0; s < partials.splits; ++s) {
        const float weight = std::exp2(partials.m(pair, s)[r] - base);
        l += partials.l(pair, s)[r] * weight;
        const float* o = partials.o(pair, s) + r * partials.width;
        for (int64_t d = 0; d < p.value_dim; ++d) sum[d] += o[d] * weight;
      }
      const int64_t h = kv_head * group + r / queries, i = r % queries;
      const Rule rule = rule_of(p, b, h);
      const bool nothing =  // an infinite sink takes all
          l == 0.0f || (rule.has_sink && rule.sink == std::numeric_limits<float>::infinity());
      if (nothing) std::fill(sum.begin(), sum.end(), 0.0f);  // 0 * NaN may lie there
      kernels().write_rows(sum.data(), 0, nothing ? 0.0f : rule.keep_scale / l, 1, p.value_dim,
                           p.q.dtype, const_cast<void*>(q_at(p, out.out, b, h, i)), 0,
                           out.out.stride[3]);
      if (!out.lse.data) continue;
      constexpr double kInfinity = std::numeric_limits<double>::infinity();
      set_row_statistic(p, out.lse, b, h, i,
                        m == kInfinity ? kInfinity
                        : l == 0.0f    ? -kInfinity
                                       : (m + std::log2(double{l})) * kLn2);
    }
  };
  for_tasks(p, pairs * partials.splits, [&](int64_t task) {
    const int64_t pair = task / partials.splits, split = task % partials.splits;
    attend(p, shape, pair / p.kv_heads, pair % p.kv_heads, split * per_split,
           (split + 1) * per_split, partials.m(pair, split), partials.l(pair, split),
           partials.o(pair, split), partials.width);
    if (partials.splits == 1) merge(pair);
  });
  if (partials.splits > 1) for_tasks(p, pairs, merge);
}

}  // namespace pentad::attention
