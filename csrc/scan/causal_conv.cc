// SPDX-License-Identifier: Apache-2.0
// The causal convolution: sequences are cut into spans whose taps all count and edges where some do
// not, and those by blocks of channels into tasks.
#include "scan/causal_conv_kernels.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/scan.h"

namespace pentad::scan {
namespace {

constexpr int64_t kSmall = 1 << 15;  // elements that one thread takes alone, some 10 us
constexpr int64_t kTask = 1 << 16;   // elements of a task, about
constexpr int64_t kEdge = 64;        // steps of an edge at a time
constexpr int64_t kShort = 8;        // a span of fewer clean steps joins the edges around it
constexpr int64_t kMostGroups = 64;  // of partial sums of the weights' gradients

void for_tasks(int64_t work, int64_t tasks, const std::function<void(int64_t)>& task) {
  if (work > kSmall) return parallel_for(tasks, task);
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

Strided strided(const Operand& x, int64_t first, int64_t d, int64_t t, int64_t channel,
                int64_t time) {
  if (!x.data) return {};
  return {static_cast<char*>(x.data) + (first + d * channel + t * time) * size_of(x.dtype), x.dtype,
          channel, time};
}

struct Sequence {
  int64_t s, b, begin, length;
};
Sequence sequence(const CausalConv& p, int64_t s) {
  if (p.begin.empty()) return {s, s, 0, p.length};
  return {s, 0, p.begin[s], p.begin[s + 1] - p.begin[s]};
}
// (b, d, t) from channel d and the sequence's first step on; (s, d, k).
Strided steps_of(const Operand& x, const Sequence& at, int64_t d) {
  return strided(x, at.b * x.stride[0], d, at.begin, x.stride[1], x.stride[2]);
}
Strided state_of(const Operand& x, const Sequence& at, int64_t d) {
  return strided(x, at.s * x.stride[0], d, 0, x.stride[1], x.stride[2]);
}

struct Span {
  int64_t s, first, count;
  bool edge;
};

// How a problem is cut. `further`: steps after a clean span whose taps must all count as well.
class Plan {
 public:
  Plan(const CausalConv& p, bool before_counts, int64_t further)
      : p_(p), before_counts_(before_counts), further_(further) {
    // Blocks of channels where they are contiguous, of time where that is.
    const bool by_time = p.x.stride[2] == 1 && (p.x.stride[1] != 1 || p.dim < 16);
    const int64_t most = by_time ? 32 : kMaxConvChannels;
    if (by_time) unit_ = 16;
    channels = std::min(most, std::max<int64_t>(16, ceil_div(p.dim, 16) * 16));
    steps_ = std::max<int64_t>(128, kTask / channels);
    blocks = ceil_div(p.dim, channels);
    for (int64_t s = 0; s < p.sequences(); ++s) {
      if (p.seq_idx) cut_by_index(sequence(p, s));
      else cut(sequence(p, s));
    }
  }

  int64_t channels, blocks;  // per task; tasks per span
  std::vector<Span> spans;

  // Of a span's steps and `further` ones; null where all taps count.
  const uint64_t* masks(const Span& span, uint64_t* out) const {
    if (!span.edge || (before_counts_ && !p_.seq_idx)) return nullptr;
    const int64_t before = p_.width - 1;
    const Sequence at = sequence(p_, span.s);
    const int64_t count = std::min(span.count + further_, at.length - span.first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = span.first + i;
      out[i] = 0;
      if (p_.seq_idx && index(at.b, t) < 0) continue;
      for (int64_t k = 0; k <= before; ++k) {
        const int64_t from = t - before + k;
        const bool counts =
            from < 0 ? before_counts_ : !p_.seq_idx || index(at.b, from) == index(at.b, t);
        out[i] |= static_cast<uint64_t>(counts) << k;
      }
    }
    return out;
  }

 private:
  int32_t index(int64_t b, int64_t t) const {
    return p_.seq_idx[b * p_.seq_idx_stride[0] + t * p_.seq_idx_stride[1]];
  }
  void add(int64_t s, int64_t begin, int64_t end, bool edge) {
    const int64_t most = edge ? kEdge : steps_;
    for (; begin < end; begin += most)
      spans.push_back({s, begin, std::min(most, end - begin), edge});
  }
  void cut(const Sequence& at) {
    const int64_t clean = std::min(at.length, ceil_div(p_.width - 1, unit_) * unit_);
    const int64_t end = further_ ? (at.length - further_) / unit_ * unit_ : at.length;
    if (end - clean < kShort) return add(at.s, 0, at.length, true);
    add(at.s, 0, clean, true);
    add(at.s, clean, end, false);
    add(at.s, end, at.length, true);
  }
  void cut_by_index(const Sequence& at) {
    int64_t done = 0;
    for (int64_t t = 0; t < at.length;) {
      int64_t end = t + 1;  // of the run of one index
      while (end < at.length && index(at.b, end) == index(at.b, t)) ++end;
      const int64_t first = t + p_.width - 1, last = end - further_;
      if (index(at.b, t) >= 0 && last - first >= kShort) {
        add(at.s, done, first, true);
        add(at.s, first, last, false);
        done = last;
      }
      t = end;
    }
    add(at.s, done, at.length, true);
  }

  const CausalConv& p_;
  bool before_counts_;
  int64_t further_, steps_;
  int64_t unit_ = 1;  // clean spans begin and end at multiples of it
};

// [vector][width + 1][lane], see causal_conv_kernels.h.
int64_t taps_size(const CausalConv& p) {
  return ceil_div(p.dim, kernels().lanes) * kernels().lanes * (p.width + 1);
}
Scratch<float> taps_of(const CausalConv& p) {
  Scratch<float> taps(taps_size(p));
  constexpr int64_t kBlock = 256;
  for_tasks(p.dim * p.width, ceil_div(p.dim, kBlock), [&](int64_t block) {
    const int64_t d = block * kBlock;
    ConvTapsJob job{};
    job.weight = strided(p.weight, 0, d, 0, p.weight.stride[0], p.weight.stride[1]);
    job.bias = strided(p.bias, 0, d, 0, p.bias.stride[0], 0);
    job.channels = std::min(kBlock, p.dim - d);
    job.width = p.width;
    job.taps = taps.get() + d * (p.width + 1);
    kernels().conv_taps(job);
  });
  return taps;
}

ConvSpan span_of(const CausalConv& p, const Plan& plan, const Span& span, int64_t d,
                 const float* taps, uint64_t* masks) {
  const Sequence at = sequence(p, span.s);
  ConvSpan out{};
  out.channels = std::min(plan.channels, p.dim - d);
  out.width = p.width;
  out.first = span.first;
  out.count = span.count;
  out.taps = taps + d * (p.width + 1);
  out.masks = plan.masks(span, masks);
  out.silu = p.silu;
  out.x = steps_of(p.x, at, d);
  out.initial = state_of(p.initial, at, d);
  return out;
}

// The last width - 1 inputs of each sequence.
template <class T>
void copy_final(const CausalConv& p, const Operand& final) {
  constexpr int64_t kBlock = 256;
  const int64_t before = p.width - 1, blocks = ceil_div(p.dim, kBlock);
  const auto element = [](const Strided& x, int64_t d, int64_t t) -> T& {
    return static_cast<T*>(x.data)[d * x.channel + t * x.time];
  };
  for_tasks(p.sequences() * p.dim * before, p.sequences() * blocks, [&](int64_t task) {
    const Sequence at = sequence(p, task / blocks);
    const int64_t d0 = task % blocks * kBlock, count = std::min(kBlock, p.dim - d0);
    const Strided x = steps_of(p.x, at, d0), initial = state_of(p.initial, at, d0);
    const Strided out = state_of(final, at, d0);
    for (int64_t d = 0; d < count; ++d)
      for (int64_t i = 0; i < before; ++i) {
        const int64_t t = at.length - before + i;
        element(out, d, i) = t >= 0         ? element(x, d, t)
                             : initial.data ? element(initial, d, before + t)
                                            : T{};
      }
  });
}

// An empty sequence passes its final state's gradient on.
template <class T>
void copy_empty_gradients(const CausalConv& p, const CausalConvGradients& g) {
  for (int64_t s = 0; s < p.sequences(); ++s) {
    const Sequence at = sequence(p, s);
    if (at.length) continue;
    const Strided from = state_of(g.d_final, at, 0), to = state_of(g.dinitial, at, 0);
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t i = 0; i < p.width - 1; ++i)
        static_cast<T*>(to.data)[d * to.channel + i * to.time] =
            from.data ? static_cast<T*>(from.data)[d * from.channel + i * from.time] : T{};
  }
}

}  // namespace

void causal_conv_forward(const CausalConv& p, const Operand& out, const Operand& final) {
  if (p.x.dtype == DType::f64) return reference_causal_conv_forward(p, out, final);
  if (p.dim == 0 || p.sequences() == 0) return;
  const Plan plan(p, p.initial.data, 0);
  const Scratch<float> taps = taps_of(p);
  for_tasks(p.batch * p.dim * p.length, static_cast<int64_t>(plan.spans.size()) * plan.blocks,
            [&](int64_t task) {
              const Span& span = plan.spans[task / plan.blocks];
              const int64_t d = task % plan.blocks * plan.channels;
              uint64_t masks[kEdge];
              ConvForwardJob job{};
              job.span = span_of(p, plan, span, d, taps.get(), masks);
              job.out = steps_of(out, sequence(p, span.s), d);
              kernels().conv_forward(job);
            });
  if (!final.data || p.width == 1) return;
  if (p.x.dtype == DType::f32) copy_final<uint32_t>(p, final);
  else copy_final<uint16_t>(p, final);
}

void causal_conv_backward(const CausalConv& p, const CausalConvGradients& g) {
  if (p.x.dtype == DType::f64) return reference_causal_conv_backward(p, g);
  if (p.dim == 0) return;
  const Plan plan(p, p.initial.data, p.width - 1);
  const Scratch<float> taps = taps_of(p);
  // Spans in groups, whose sums of dp and dp x are added up in the groups' order.
  const int64_t steps = std::max<int64_t>(128, ceil_div(p.batch * p.length, kMostGroups));
  std::vector<int64_t> groups;  // the first span of each
  int64_t filled = steps;
  for (size_t i = 0; i < plan.spans.size(); ++i) {
    if (filled >= steps) {
      groups.push_back(static_cast<int64_t>(i));
      filled = 0;
    }
    filled += plan.spans[i].count;
  }
  const int64_t group_count = static_cast<int64_t>(groups.size());
  groups.push_back(static_cast<int64_t>(plan.spans.size()));
  const int64_t size = taps_size(p);
  const Scratch<float> sums(group_count * size);
  const int64_t work = p.batch * p.dim * p.length * 2;
  for_tasks(work, group_count * plan.blocks, [&](int64_t task) {
    const int64_t group = task / plan.blocks, d = task % plan.blocks * plan.channels;
    float* own = sums.get() + group * size + d * (p.width + 1);
    const int64_t end = std::min(size, (d + plan.channels) * (p.width + 1));
    std::memset(own, 0, (end - d * (p.width + 1)) * sizeof(float));
    for (int64_t i = groups[group]; i < groups[group + 1]; ++i) {
      const Span& span = plan.spans[i];
      const Sequence at = sequence(p, span.s);
      uint64_t masks[kEdge + kMaxConvWidth];
      ConvBackwardJob job{};
      job.span = span_of(p, plan, span, d, taps.get(), masks);
      job.length = at.length;
      job.d_out = steps_of(g.d_out, at, d);
      job.d_final = state_of(g.d_final, at, d);
      job.dx = steps_of(g.dx, at, d);
      job.dinitial = state_of(g.dinitial, at, d);
      job.sums = own;
      kernels().conv_backward(job);
    }
  });
  const int64_t lanes = kernels().lanes, vectors = ceil_div(p.dim, lanes);
  for_tasks(group_count * size, ceil_div(vectors, 8), [&](int64_t block) {
    for (int64_t d = block * 8 * lanes; d < std::min(p.dim, (block + 1) * 8 * lanes); ++d)
      for (int64_t k = 0; k <= p.width; ++k) {
        const Operand& to = k < p.width ? g.dweight : g.dbias;
        if (!to.data) continue;
        const float* from = sums.get() + (d / lanes * (p.width + 1) + k) * lanes + d % lanes;
        double sum = 0;
        for (int64_t group = 0; group < group_count; ++group) sum += from[group * size];
        const int64_t at = d * to.stride[0] + (k < p.width ? k * to.stride[1] : 0);
        static_cast<float*>(to.data)[at] = static_cast<float>(sum);
      }
  });
  if (!g.dinitial.data) return;
  if (p.x.dtype == DType::f32) copy_empty_gradients<uint32_t>(p, g);
  else copy_empty_gradients<uint16_t>(p, g);
}

void causal_conv_update(const ConvUpdate& update) {
  const CausalConv& p = update.conv;
  if (p.x.dtype == DType::f64) return reference_causal_conv_update(update);
  if (p.dim == 0 || p.length == 0) return;
  const Scratch<float> taps = taps_of(p);
  constexpr int64_t kBlock = 256;
  const int64_t blocks = ceil_div(p.dim, kBlock), size = update.state_length;
  for_tasks(p.batch * p.dim * (p.length + size), p.batch * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, d = task % blocks * kBlock;
    const int64_t row = update.rows.empty() ? b : update.rows[b];
    ConvUpdateJob job{};
    job.channels = std::min(kBlock, p.dim - d);
    job.width = p.width;
    job.state_length = size;
    job.taps = taps.get() + d * (p.width + 1);
    job.silu = p.silu;
    // x a few steps at a time, as if they came in several calls.
    for (int64_t t = 0; t < p.length; t += kChunk) {
      job.length = std::min<int64_t>(kChunk, p.length - t);
      const Sequence at = {b, b, t, job.length};
      job.x = steps_of(p.x, at, d);
      job.out = steps_of(update.out, at, d);
      if (row < 0) {
        const int64_t bytes = size_of(job.out.dtype);
        for (int64_t c = 0; c < job.channels; ++c)
          for (int64_t i = 0; i < job.length; ++i)
            std::memset(
                static_cast<char*>(job.out.data) + (c * job.out.channel + i * job.out.time) * bytes,
                0, bytes);
        continue;
      }
      job.state = state_of(update.state, {row, row, 0, 0}, d);
      job.position = -1;
      if (!update.positions.empty() && size > 0)
        job.position = ((update.positions[b] + t) % size + size) % size;
      kernels().conv_update(job);
    }
  });
}

}  // namespace pentad::scan
