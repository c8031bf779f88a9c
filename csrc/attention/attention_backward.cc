// SPDX-License-Identifier: Apache-2.0
// The backward pass. A task owns a share of the keys of one KV head: tile by tile it goes through
// all queries that meet the tile, finishes dk and dv, and adds to dq of its share in the order of
// the keys; the shares of dq are added up at the end, in order. The number of shares follows from
// the shape, so the bits do not depend on threads. A bias that is shared by heads or sequences gets
// its gradient from one task after the other. Short sequences are whole problems of one KV head
// each, packed and finished by one task while they are in L2.
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/attention_drive.h"

namespace pentad::attention {
namespace {

constexpr int64_t kTasks = 16;      // that sharing aims at
constexpr int64_t kMostShares = 8;  // each costs a copy of dq in f32

// What counts as short, and how many KV heads there must be to keep the threads busy.
constexpr int64_t kShortQueries = 2 * kQueryBlock;  // of all heads of a group
constexpr int64_t kShortKeys = 4 * kTile;
constexpr int64_t kShortHeads = 8;

// Query-side rows, per (sequence, head) padded to whole blocks of 64.
class PackedQueries {
 public:
  PackedQueries(const Problem& p, const Gradients& g, const Shape& shape)
      : p_(p), g_(g), shape_(shape), first_(p.batch + 1) {
    for (int64_t b = 0; b < p.batch; ++b)
      first_[b + 1] = first_[b] + padded(p.q_len(b), kTile) * p.heads;
    const int64_t rows = first_.back();
    const auto room = [&](int64_t floats) { return Scratch<float>(floats); };
    if (shape.bf16) {
      q_rows_ = room(rows * shape.units);
      do_rows_ = room(rows * shape.value_units);
    }
    if (!is_packed(p.q, p.dim)) q_pairs_ = room(rows / pair() * shape.width);
    if (!is_packed(g.d_out, p.value_dim)) do_pairs_ = room(rows / pair() * shape.value_width);
    lse_ = Scratch<LogSum>(rows);
    delta_ = room(rows);
  }

  int64_t total_rows() const { return first_.back(); }
  // Row number of query i.
  int64_t row(int64_t b, int64_t h, int64_t i) const {
    return first_[b] + h * padded(p_.q_len(b), kTile) + i;
  }
  LogSum* lse(int64_t row) const { return lse_.get() + row; }
  float* delta(int64_t row) const { return delta_.get() + row; }
  // Query i, a multiple of 64. f32 rows are their own pairs form, and may stay where they are.
  const float* q_rows(int64_t b, int64_t h, int64_t i) const {
    return shape_.bf16 ? q_rows_.get() + row(b, h, i) * shape_.units : q_pairs(b, h, i);
  }
  const float* do_rows(int64_t b, int64_t h, int64_t i) const {
    return shape_.bf16 ? do_rows_.get() + row(b, h, i) * shape_.value_units : do_pairs(b, h, i);
  }
  int64_t q_step() const { return shape_.bf16 ? shape_.units : shape_.width; }
  int64_t do_step() const { return shape_.bf16 ? shape_.value_units : shape_.value_width; }
  const float* q_pairs(int64_t b, int64_t h, int64_t i) const {
    if (!q_pairs_.get()) return static_cast<const float*>(q_at(p_, p_.q, b, h, i));
    return q_pairs_.get() + row(b, h, i) / pair() * shape_.width;
  }
  const float* do_pairs(int64_t b, int64_t h, int64_t i) const {
    if (!do_pairs_.get()) return static_cast<const float*>(q_at(p_, g_.d_out, b, h, i));
    return do_pairs_.get() + row(b, h, i) / pair() * shape_.value_width;
  }

  void pack(int64_t b, int64_t h, int64_t first) {
    const int64_t count = std::min<int64_t>(kTile, p_.q_len(b) - first), at = row(b, h, first);
    const Rows q = pentad::attention::q_rows(p_, p_.q, b, h, first, count, p_.dim);
    const Rows d_out = pentad::attention::q_rows(p_, g_.d_out, b, h, first, count, p_.value_dim);
    const Rows out = pentad::attention::q_rows(p_, g_.out, b, h, first, count, p_.value_dim);
    if (shape_.bf16) {
      kernels().pack_rows(q, true, q_rows_.get() + at * shape_.units);
      kernels().pack_rows(d_out, true, do_rows_.get() + at * shape_.value_units);
    }
    if (q_pairs_.get())
      kernels().pack_pairs(q, shape_.bf16, q_pairs_.get() + at / pair() * shape_.width);
    if (do_pairs_.get())
      kernels().pack_pairs(d_out, shape_.bf16, do_pairs_.get() + at / pair() * shape_.value_width);
    kernels().row_dots(out, d_out, delta(at));
    for (int64_t i = 0; i < count; ++i) {
      lse(at)[i] = log_sum(row_statistic(p_, g_.lse, b, h, first + i));
      if (g_.d_lse.data)
        delta(at)[i] -= static_cast<float>(row_statistic(p_, g_.d_lse, b, h, first + i));
    }
  }

 private:
  int64_t pair() const { return shape_.bf16 ? 2 : 1; }

  const Problem& p_;
  const Gradients& g_;
  const Shape& shape_;
  std::vector<int64_t> first_;
  Scratch<float> q_rows_, do_rows_, q_pairs_, do_pairs_, delta_;
  Scratch<LogSum> lse_;
};

class Backward {
 public:
  Backward(const Problem& p, const Gradients& g, int64_t most_shares)
      : p_(p),
        g_(g),
        most_shares_(most_shares),
        shape_(p),
        keys_(p, shape_, PackedKeys::k_lanes | PackedKeys::v_lanes | PackedKeys::k_pairs),
        queries_(p, g, shape_),
        blocks_(query_blocks(p, kQueryBlock)) {}

  void run() {
    keys_.pack_all();
    pack_queries();
    if (g_.d_key_mass) add_mass_to_delta();
    int64_t most_tiles = 1;
    for (int64_t b = 0; b < p_.batch; ++b) most_tiles = std::max(most_tiles, keys_.tiles(b));
    shares_ = std::clamp<int64_t>(ceil_div(kTasks, std::max<int64_t>(1, p_.batch * p_.kv_heads)), 1,
                                  std::min(most_shares_, most_tiles));
    dq_ = Scratch<float>(shares_ * queries_.total_rows() * shape_.width);
    zero_bias_gradients();
    keys_and_values();
    sum_dq();
    if (g_.dsink) sinks();
  }

 private:
  // 64-row blocks of all (sequence, head) pairs, as one range of tasks.
  void for_query_blocks(const std::function<void(int64_t b, int64_t h, int64_t first)>& work) {
    for_tasks(p_, queries_.total_rows() / kTile, [&](int64_t task) {
      const int64_t row = task * kTile;
      int64_t b = 0;
      while (queries_.row(b, p_.heads, 0) <= row) ++b;
      const int64_t length = padded(p_.q_len(b), kTile), local = row - queries_.row(b, 0, 0);
      work(b, local / length, local % length);
    });
  }

  void pack_queries() {
    for_query_blocks([&](int64_t b, int64_t h, int64_t i) { queries_.pack(b, h, i); });
  }

  const float* key_side(const void* base, int64_t b, int64_t h, int64_t heads) const {
    if (p_.k_begin.empty()) return static_cast<const float*>(base) + (b * heads + h) * p_.max_k;
    return static_cast<const float*>(base) + h * p_.k_begin.back() + p_.k_begin[b];
  }

  void add_mass_to_delta() {
    for_tasks(p_, static_cast<int64_t>(blocks_.size()), [&](int64_t task) {
      const QueryBlock& block = blocks_[task];
      const Scratch<float> scratch = Scratch<float>(forward_scratch(p_.dim, p_.value_dim));
      std::vector<Span> spans;
      spans_of(p_, block, 0, keys_.tiles(block.b), spans);
      const Rule rule = rule_of(p_, block.b, block.h);
      const int64_t row = queries_.row(block.b, block.h, block.first);
      MassJob job{};
      job.rule = &rule;
      job.q = q_rows(p_, p_.q, block.b, block.h, block.first, block.rows, p_.dim);
      job.first = block.first;
      job.k = keys_.get(PackedKeys::k_lanes, block.b, block.h / p_.group());
      job.spans = spans.data();
      job.span_count = static_cast<int64_t>(spans.size());
      job.scratch = scratch.get();
      job.lse = queries_.lse(row);
      job.weights = key_side(g_.d_key_mass, block.b, block.h, p_.heads);
      job.row_sums = queries_.delta(row);
      kernels().mass[shape_.bf16](job);
    });
  }

  void zero_bias_gradients() {
    if (!g_.dbias.data) return;
    const int64_t* stride = g_.dbias.stride;
    const int64_t count = (stride[0] ? p_.batch : 1) * (stride[1] ? p_.heads : 1) * p_.max_q *
                          (stride[3] ? p_.max_k : 1);
    std::memset(g_.dbias.data, 0, count * sizeof(float));
  }

  void keys_and_values() {
    // A shared bias: what shares it is served by one task, in order.
    const bool bias = g_.dbias.data;
    const int64_t b_tasks = bias && !g_.dbias.stride[0] ? 1 : p_.batch;
    const int64_t h_tasks = bias && !g_.dbias.stride[1] ? 1 : p_.kv_heads;
    // A bias with one column for all keys is shared by the shares, too.
    const int64_t share_tasks = bias && !g_.dbias.stride[3] ? 1 : shares_;
    for_tasks(p_, b_tasks * h_tasks * share_tasks, [&](int64_t task) {
      const int64_t share = task % share_tasks, pair = task / share_tasks;
      const int64_t h0 = pair % h_tasks, b0 = pair / h_tasks;
      for (int64_t b = b0; b < p_.batch; b += b_tasks)
        for (int64_t h = h0; h < p_.kv_heads; h += h_tasks)
          for (int64_t s = share; s < shares_; s += share_tasks) one_share(b, h, s);
    });
  }

  void one_share(int64_t b, int64_t kv_head, int64_t share) {
    const int64_t group = p_.group(), length = p_.q_len(b);
    const int64_t per_share = ceil_div(keys_.tiles(b), shares_);
    const int64_t tile_end = std::min(keys_.tiles(b), (share + 1) * per_share);
    const int64_t width = shape_.width, value_width = shape_.value_width;
    float* dq = dq_.get() + share * queries_.total_rows() * width;
    for (int64_t g = 0; g < group; ++g)
      std::memset(dq + queries_.row(b, kv_head * group + g, 0) * width, 0,
                  length * width * sizeof(float));
    const Scratch<float> scratch =
        Scratch<float>(backward_scratch() + kTile * (width + value_width + 1));
    float* dk = scratch.get() + backward_scratch();
    float* dv = dk + kTile * width;
    float* dkey_bias = dv + kTile * value_width;
    std::vector<Meeting> meetings;
    for (int64_t tile = share * per_share; tile < tile_end; ++tile) {
      const int64_t key = tile * kTile, count = std::min<int64_t>(kTile, p_.k_len(b) - key);
      std::memset(dk, 0, kTile * (width + value_width + 1) * sizeof(float));
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const Rule rule = rule_of(p_, b, h);
        meetings_of(p_, b, h, tile, meetings);
        for (const Meeting& meeting : meetings) {
          const int64_t row = queries_.row(b, h, meeting.first);
          BackwardJob job{};
          job.rule = &rule;
          job.dim = p_.dim;
          job.value_dim = p_.value_dim;
          job.first = meeting.first;
          job.rows = meeting.rows;
          job.row_begin = meeting.row_begin;
          job.row_end = meeting.row_end;
          job.q_rows = queries_.q_rows(b, h, meeting.first);
          job.do_rows = queries_.do_rows(b, h, meeting.first);
          job.q_step = queries_.q_step();
          job.do_step = queries_.do_step();
          job.q_pairs = queries_.q_pairs(b, h, meeting.first);
          job.do_pairs = queries_.do_pairs(b, h, meeting.first);
          job.k_lanes = keys_.get(PackedKeys::k_lanes, b, kv_head) + tile * shape_.units * kTile;
          job.k_pairs = keys_.get(PackedKeys::k_pairs, b, kv_head) + tile * width * shape_.key_rows;
          job.v_lanes =
              keys_.get(PackedKeys::v_lanes, b, kv_head) + tile * shape_.value_units * kTile;
          job.span = &meeting.span;
          job.lse = queries_.lse(row);
          job.delta = queries_.delta(row);
          if (g_.d_key_mass) job.mass_gradient = key_side(g_.d_key_mass, b, h, p_.heads) + key;
          job.dq = dq + row * width;
          job.dk = dk;
          job.dv = dv;
          if (g_.dbias.data) {
            const int64_t* stride = g_.dbias.stride;
            job.dbias = static_cast<float*>(g_.dbias.data) + b * stride[0] + h * stride[1] +
                        meeting.first * stride[2] + key * stride[3];
            job.dbias_q = stride[2];
            job.dbias_k = stride[3];
          }
          if (g_.dkey_bias) job.dkey_bias = dkey_bias;
          job.scratch = scratch.get();
          kernels().backward[shape_.bf16](job);
        }
        if (g_.dkey_bias && (p_.key_bias_heads == p_.heads || (h + 1) % group == 0)) {
          const int64_t head = p_.key_bias_heads == p_.heads ? h : kv_head;
          std::memcpy(const_cast<float*>(key_side(g_.dkey_bias, b, head, p_.key_bias_heads)) + key,
                      dkey_bias, count * sizeof(float));
          std::memset(dkey_bias, 0, kTile * sizeof(float));
        }
      }
      const DType dtype = p_.q.dtype;
      if (g_.dk.data)
        kernels().write_rows(dk, width, static_cast<float>(p_.scale), count, p_.dim, dtype,
                             const_cast<void*>(k_at(p_, g_.dk, b, kv_head, key)), g_.dk.stride[2],
                             g_.dk.stride[3]);
      if (g_.dv.data)
        kernels().write_rows(dv, value_width, 1.0f, count, p_.value_dim, dtype,
                             const_cast<void*>(k_at(p_, g_.dv, b, kv_head, key)), g_.dv.stride[2],
                             g_.dv.stride[3]);
    }
  }

  void sum_dq() {
    if (!g_.dq.data) return;
    const int64_t width = shape_.width, all = queries_.total_rows() * width;
    for_query_blocks([&](int64_t b, int64_t h, int64_t first) {
      const int64_t count = std::min<int64_t>(kTile, p_.q_len(b) - first);
      float* sum = dq_.get() + queries_.row(b, h, first) * width;
      for (int64_t share = 1; share < shares_; ++share)
        for (int64_t i = 0; i < count * width; ++i) sum[i] += sum[share * all + i];
      kernels().write_rows(sum, width, static_cast<float>(p_.scale), count, p_.dim, p_.q.dtype,
                           const_cast<void*>(q_at(p_, g_.dq, b, h, first)), g_.dq.stride[2],
                           g_.dq.stride[3]);
    });
  }

  void sinks() {
    for_tasks(p_, p_.heads, [&](int64_t h) {
      const double sink = static_cast<const float*>(p_.sink)[h];
      double sum = 0.0;
      for (int64_t b = 0; b < p_.batch; ++b)
        for (int64_t i = 0; i < p_.q_len(b); ++i) {
          const int64_t row = queries_.row(b, h, i);
          const double lse = row_statistic(p_, g_.lse, b, h, i);
          if (lse == -std::numeric_limits<double>::infinity()) continue;
          sum -= std::exp(sink - lse) * *queries_.delta(row);
        }
      static_cast<float*>(g_.dsink)[h] = static_cast<float>(sum);
    });
  }

  const Problem& p_;
  const Gradients& g_;
  const int64_t most_shares_;
  const Shape shape_;
  PackedKeys keys_;
  PackedQueries queries_;
  std::vector<QueryBlock> blocks_;
  int64_t shares_ = 1;
  Scratch<float> dq_;
};

// The part of a problem that belongs to one KV head of one sequence, as a problem of its own.
class Part {
 public:
  // `dense` is p without its lists of sequences, which a part does not need.
  Part(const Problem& p, const Problem& dense, const Gradients& g, int64_t b, int64_t kv_head)
      : problem(dense) {
    const int64_t group = p.group(), head = kv_head * group;
    problem.batch = problem.kv_heads = 1;
    problem.heads = group;
    problem.max_q = p.q_len(b);
    problem.max_k = p.k_len(b);
    problem.first_stream = p.first_stream + b * p.heads + head;
    const auto queries = [&](Operand& x) {
      if (x.data) x.data = const_cast<void*>(q_at(p, x, b, head, 0));
    };
    const auto keys = [&](Operand& x) {
      if (x.data) x.data = const_cast<void*>(k_at(p, x, b, kv_head, 0));
    };
    const auto planes = [&](Operand& x) {  // (b, h) alone
      const int64_t first = x.stride[2];
      x.stride[2] = 0;
      queries(x);
      x.stride[2] = first;
    };
    queries(problem.q);
    keys(problem.k);
    keys(problem.v);
    planes(problem.bias);
    if (p.key_bias) {
      const Rule rule = rule_of(p, b, head);
      problem.key_bias = rule.key_bias;
      problem.key_bias_heads = p.key_bias_heads == p.heads ? group : 1;
    }
    if (p.alibi)
      problem.alibi =
          static_cast<const float*>(p.alibi) + b * p.alibi_stride[0] + head * p.alibi_stride[1];
    if (p.sink) problem.sink = static_cast<const float*>(p.sink) + head;
    gradients = g;
    for (Operand* x :
         {&gradients.out, &gradients.lse, &gradients.d_out, &gradients.d_lse, &gradients.dq})
      queries(*x);
    keys(gradients.dk);
    keys(gradients.dv);
    planes(gradients.dbias);
    if (g.dkey_bias) {
      const int64_t first = p.key_bias_heads == p.heads ? head : kv_head;
      gradients.dkey_bias =
          static_cast<float*>(g.dkey_bias) + (b * p.key_bias_heads + first) * p.max_k;
    }
  }

  Problem problem;
  Gradients gradients;
};

// Whether the parts of a problem are independent and small.
bool is_short(const Problem& p, const Gradients& g) {
  const bool own_bias =
      !g.dbias.data || ((g.dbias.stride[0] || p.batch == 1) && (g.dbias.stride[1] || p.heads == 1));
  return !p.mask && p.max_q * p.group() <= kShortQueries && p.max_k <= kShortKeys &&
         p.batch * p.kv_heads >= kShortHeads && own_bias && !g.dsink && !g.d_key_mass &&
         !(g.dkey_bias && !p.k_begin.empty());
}

}  // namespace

void backward(const Problem& p, const Gradients& g) {
  if (p.q.dtype == DType::f64) return reference_backward(p, g);
  if (p.heads == 0) return;
  if (!is_short(p, g)) return Backward(p, g, kMostShares).run();
  Problem dense = p;
  dense.q_begin.clear();
  dense.k_begin.clear();
  for_tasks(p, p.batch * p.kv_heads, [&](int64_t task) {
    const Part part(p, dense, g, task / p.kv_heads, task % p.kv_heads);
    Backward(part.problem, part.gradients, 1).run();
  });
}

}  // namespace pentad::attention
