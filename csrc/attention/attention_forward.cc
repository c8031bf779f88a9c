// SPDX-License-Identifier: Apache-2.0
// The forward pass, three ways by shape (never by thread count, so the bits are the same):
//   long    keys are packed once per KV head, then blocks of queries are independent tasks;
//   short   a task packs the keys of one KV head and serves all its queries while they are in L2
//           (D = 64, causal: 11 % less time at 64 heads of 256 keys, 2 to 11 % at 32 of 512);
//   few     decoding: nothing is packed, the keys are split over tasks (attention_few.cc).
#include <tuple>

#include "attention/attention_drive.h"
#include "attention/attention_few.h"

namespace pentad::attention {
namespace {

// Short: so few queries (of all heads of a group) and keys, or enough tasks whose keys and values,
// packed, leave room in the L2.
constexpr int64_t kShortQueries = 2 * kQueryBlock, kShortTiles = 8;
constexpr int64_t kShortTasks = 32, kShortBytes = 512 << 10;
constexpr int64_t kMassTiles = 8;  // a task's share of the keys

void* out_at(const Problem& p, const Operand& out, int64_t b, int64_t h, int64_t i) {
  return const_cast<void*>(q_at(p, out, b, h, i));
}

void forward_block(const Problem& p, const Shape& shape, const PackedKeys& keys,
                   const QueryBlock& block, const Outputs& out, std::vector<Span>& spans,
                   float* scratch) {
  const int64_t kv_head = block.h / p.group();
  spans_of(p, block, 0, keys.tiles(block.b), spans);
  const Rule rule = rule_of(p, block.b, block.h);
  ForwardJob job{};
  job.rule = &rule;
  job.q = q_rows(p, p.q, block.b, block.h, block.first, block.rows, p.dim);
  job.first = block.first;
  job.value_dim = p.value_dim;
  job.k = keys.get(PackedKeys::k_lanes, block.b, kv_head);
  job.v = keys.get(PackedKeys::v_pairs, block.b, kv_head);
  job.spans = spans.data();
  job.span_count = static_cast<int64_t>(spans.size());
  job.scratch = scratch;
  job.out = out_at(p, out.out, block.b, block.h, block.first);
  job.out_row = out.out.stride[2];
  job.out_element = out.out.stride[3];
  double lse[kQueryBlock];
  job.lse = lse;
  kernels().forward[shape.bf16](job);
  if (out.lse.data)
    for (int64_t r = 0; r < block.rows; ++r)
      set_row_statistic(p, out.lse, block.b, block.h, block.first + r, lse[r]);
}

bool is_short(const Problem& p) {
  if (p.mask) return false;
  if (p.max_q * p.group() <= kShortQueries && p.max_k <= kShortTiles * kTile) return true;
  return p.batch * p.kv_heads >= kShortTasks &&
         padded(p.max_k, kTile) * (p.dim + p.value_dim) * 4 <= kShortBytes;
}

void forward_short(const Problem& p, const Outputs& out) {
  const Shape shape(p);
  for_tasks(p, p.batch * p.kv_heads, [&](int64_t task) {
    const int64_t b = task / p.kv_heads, kv_head = task % p.kv_heads;
    const int64_t length = p.q_len(b);
    if (length == 0) return;
    PackedKeys keys(p, shape, PackedKeys::k_lanes | PackedKeys::v_pairs, true);
    keys.pack_one(b, kv_head);
    const Scratch<float> scratch = Scratch<float>(forward_scratch(p.dim, p.value_dim));
    std::vector<Span> spans;
    for (int64_t g = 0; g < p.group(); ++g)
      for (int64_t i = 0; i < length; i += kQueryBlock)
        forward_block(p, shape, keys,
                      {b, kv_head * p.group() + g, i, std::min<int64_t>(kQueryBlock, length - i)},
                      out, spans, scratch.get());
  });
}

// mass[b][h][j] = sum_i p_ij; tasks share out the keys, and each goes through all queries in order.
void key_mass(const Problem& p, const Shape& shape, const PackedKeys& keys, const Outputs& out) {
  std::vector<QueryBlock> blocks = query_blocks(p, kQueryBlock);
  std::sort(blocks.begin(), blocks.end(), [](const QueryBlock& x, const QueryBlock& y) {
    return std::tie(x.b, x.h, x.first) < std::tie(y.b, y.h, y.first);
  });
  const int64_t shares = ceil_div(ceil_div(p.max_k, kTile), kMassTiles);
  const int64_t total_keys = p.k_begin.empty() ? p.max_k : p.k_begin.back();
  float* mass = static_cast<float*>(out.key_mass);
  std::fill_n(mass, (p.k_begin.empty() ? p.batch : 1) * p.heads * total_keys, 0.0f);
  for_tasks(p, p.batch * p.heads * shares, [&](int64_t task) {
    const int64_t share = task % shares, h = task / shares % p.heads, b = task / shares / p.heads;
    const Scratch<float> scratch = Scratch<float>(forward_scratch(p.dim, p.value_dim));
    std::vector<Span> spans;
    auto block = std::lower_bound(blocks.begin(), blocks.end(), std::make_pair(b, h),
                                  [](const QueryBlock& x, const std::pair<int64_t, int64_t>& key) {
                                    return std::tie(x.b, x.h) < std::tie(key.first, key.second);
                                  });
    for (; block != blocks.end() && block->b == b && block->h == h; ++block) {
      spans_of(p, *block, share * kMassTiles, (share + 1) * kMassTiles, spans);
      const Rule rule = rule_of(p, b, h);
      MassJob job{};
      job.rule = &rule;
      job.q = q_rows(p, p.q, b, h, block->first, block->rows, p.dim);
      job.first = block->first;
      job.k = keys.get(PackedKeys::k_lanes, b, h / p.group());
      job.spans = spans.data();
      job.span_count = static_cast<int64_t>(spans.size());
      job.scratch = scratch.get();
      LogSum lse[kQueryBlock];
      for (int64_t r = 0; r < block->rows; ++r)
        lse[r] = log_sum(row_statistic(p, out.lse, b, h, block->first + r));
      job.lse = lse;
      job.mass =
          mass + (p.k_begin.empty() ? (b * p.heads + h) * p.max_k : h * total_keys + p.k_begin[b]);
      kernels().mass[shape.bf16](job);
    }
  });
}

}  // namespace

void forward(const Problem& p, const Outputs& out) {
  if (p.q.dtype == DType::f64) return reference_forward(p, out);
  if (p.batch * p.heads == 0) return;
  if (serves_few(p) && !out.key_mass) return forward_few(p, out);
  if (!out.key_mass && is_short(p)) return forward_short(p, out);

  const Shape shape(p);
  PackedKeys keys(p, shape, PackedKeys::k_lanes | PackedKeys::v_pairs);
  keys.pack_all();
  const std::vector<QueryBlock> blocks = query_blocks(p, kQueryBlock);
  for_tasks(p, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
    const Scratch<float> scratch = Scratch<float>(forward_scratch(p.dim, p.value_dim));
    std::vector<Span> spans;
    forward_block(p, shape, keys, blocks[task], out, spans, scratch.get());
  });
  if (out.key_mass) key_mass(p, shape, keys, out);
}

}  // namespace pentad::attention
