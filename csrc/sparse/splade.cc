// SPDX-License-Identifier: Apache-2.0
// Drives the kernels of splade_kernels.h: tiles, threads, and the entries of max pooling.
//
// Forward: a task takes some panels of the vocabulary, packed by itself, and all tokens against
// them. Backward of max pooling: only B * V entries (sequence, column) have a gradient; in groups
// of sequences and by column, they gather rows of hidden for the gradient of weight and scatter rows
// of weight into that of hidden, a span of columns of both at a time, so that what is read or
// written at random stays in cache. Backward of sum pooling: the slopes of some panels at a time,
// then two products.
#include "sparse/splade.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/ceil_div.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/reals.h"
#include "common/scratch.h"

namespace pentad::sparse {
namespace {

constexpr int64_t kPad = 16;               // rows of floats are padded to a multiple of this
constexpr int64_t kPanelBytes = 3 << 17;   // of packed weight that one task holds
constexpr int64_t kSpan = 64;              // columns of hidden and weight at a time, backward
constexpr int64_t kMostPanels = 16;        // of it
constexpr int64_t kTokenFloats = 1 << 15;  // of a chunk of tokens
constexpr int64_t kSlopeFloats = 1 << 21;  // of sum pooling held at a time
constexpr int64_t kGroupTokens = 2048;     // of a group of sequences, in the backward pass
constexpr int64_t kBlockColumns = 512;     // of the vocabulary in a task over entries
constexpr int64_t kSerialWork = 1 << 18;   // multiply-adds below which threads do not pay

const SpladeKernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::sparse_splade_kernels;
    case Isa::v4: return v4::sparse_splade_kernels;
    case Isa::v3: return v3::sparse_splade_kernels;
    default: return v2::sparse_splade_kernels;
#else
    default: return neon::sparse_splade_kernels;
#endif
  }
}

const char* at(const TensorView& view, int64_t offset) {
  return static_cast<const char*>(view.data) + offset * size_of(view.dtype);
}

int64_t padded_to(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The tokens with mask 1 of all sequences, one below the other. Their rows lie in spans of `step`
// columns, [spans][count][step], zeros behind the last: all of a row in one, or kSpan each, where a
// few columns of all rows are to stay in cache (of longer rows they would crowd the same sets).
struct Tokens {
  const SpladeHead& head;
  const int64_t step, spans;
  std::vector<int64_t> starts;  // of each sequence, and their number
  Scratch<int32_t> places;      // l of each
  const float* rows = nullptr;
  Scratch<float> copy;

  Tokens(const SpladeHead& h, int64_t step, bool with_rows)
      : head(h),
        step(step),
        spans(std::max<int64_t>(1, ceil_div(h.dim(), step))),
        starts(1, 0),
        places(h.batch() * h.length()) {
    for (int64_t b = 0; b < head.batch(); ++b) {
      int64_t count = 0;
      splade_tokens(head, b, places.get() + starts.back(), &count);
      starts.push_back(starts.back() + count);
    }
    if (with_rows) read_rows();
  }

  int64_t count() const { return starts.back(); }
  int64_t count_of(int64_t b) const { return starts[b + 1] - starts[b]; }
  int64_t floats() const { return spans * count() * step; }

  // Rows of that form to an array (B, L, H), zeros where the mask is 0.
  void write(const float* from, void* out) const {
    const int64_t dim = head.dim(), row_bytes = dim * size_of(head.hidden.dtype);
    each_sequence([&](int64_t b) {
      Scratch<float> whole(spans * step);
      int64_t t = starts[b];
      for (int64_t l = 0; l < head.length(); ++l) {
        char* row = static_cast<char*>(out) + (b * head.length() + l) * row_bytes;
        if (t == starts[b + 1] || places.get()[t] != l) {
          std::memset(row, 0, row_bytes);
          continue;
        }
        for (int64_t s = 0; s < spans; ++s)
          std::copy_n(from + (s * count() + t) * step, step, whole.get() + s * step);
        kernels().narrow(whole.get(), dim, head.hidden.dtype, row);
        ++t;
      }
    });
  }

 private:
  void each_sequence(const std::function<void(int64_t)>& work) const {
    parallel_for_if(head.batch() * head.length() * head.dim() > kSerialWork, head.batch(), work);
  }

  void read_rows() {
    const TensorView& x = head.hidden;
    const int64_t dim = head.dim();
    if (x.dtype == DType::f32 && dim == step && count() == head.batch() * head.length() &&
        x.strides[2] == 1 && x.strides[1] == dim && x.strides[0] == dim * head.length()) {
      rows = static_cast<const float*>(x.data);
      return;
    }
    copy = Scratch<float>(floats());
    rows = copy.get();
    each_sequence([&](int64_t b) {
      Scratch<float> whole(spans * step);
      std::fill_n(whole.get(), spans * step, 0.0f);
      for (int64_t t = starts[b]; t < starts[b + 1]; ++t) {
        kernels().widen(at(x, b * x.strides[0] + places.get()[t] * x.strides[1]), x.dtype,
                        x.strides[2], dim, whole.get());
        for (int64_t s = 0; s < spans; ++s)
          std::copy_n(whole.get() + s * step, step, copy.get() + (s * count() + t) * step);
      }
    });
  }
};

// Panels of the vocabulary [first, first + count columns), with their bias.
struct Panels {
  const int64_t width = kernels().width;
  const int64_t padded;
  int64_t first = 0, columns = 0;
  Scratch<float> values, bias, rows, zeros;

  Panels(int64_t padded, int64_t most)
      : padded(padded),
        values(most * width * padded),
        bias(most * width),
        rows(width * padded),
        zeros(padded) {
    std::fill_n(zeros.get(), padded, 0.0f);
  }

  // Rows of weight as floats [count][padded].
  static void read_rows(const SpladeHead& head, int64_t v, int64_t count, int64_t padded,
                        float* rows) {
    const TensorView& w = head.weight;
    const int64_t dim = head.dim();
    for (int64_t r = 0; r < count; ++r) {
      kernels().widen(at(w, (v + r) * w.strides[0]), w.dtype, w.strides[1], dim, rows + r * padded);
      std::fill(rows + r * padded + dim, rows + (r + 1) * padded, 0.0f);
    }
  }

  void pack(const SpladeHead& head, int64_t v, int64_t n) {
    first = v, columns = n;
    for (int64_t p = 0; p * width < n; ++p) {
      const int64_t count = std::min(width, n - p * width);
      read_rows(head, v + p * width, count, padded, rows.get());
      kernels().pack(rows.get(), count, padded, zeros.get(), values.get() + p * width * padded);
    }
    read_bias(head, v, n, padded_to(n, width), bias.get());
  }

  static void read_bias(const SpladeHead& head, int64_t v, int64_t n, int64_t floats, float* out) {
    std::fill_n(out, floats, 0.0f);
    if (head.bias)
      kernels().widen(at(*head.bias, v * head.bias->strides[0]), head.bias->dtype,
                      head.bias->strides[0], n, out);
  }

  int64_t count() const { return ceil_div(columns, width); }
};

// Of a row as one span.
int64_t row_floats(const SpladeHead& head) { return std::max(kPad, padded_to(head.dim(), kPad)); }

int64_t chunk_of(int64_t padded) {
  return std::clamp<int64_t>(kTokenFloats / padded / 6 * 6, 12, 96);
}

bool worth(const SpladeHead& head, int64_t tokens) {
  return tokens * head.vocabulary() * (head.dim() + 1) > kSerialWork;
}

float derivative(float logit, SpladeActivation activation) {
  const float once = 1.0f / (1.0f + logit);
  return activation == SpladeActivation::log1p_relu ? once : once / (1.0f + std::log1p(logit));
}

// --- Forward
// --------------------------------------------------------------------------------------

// What one task keeps for a sequence, by column.
struct Pooled {
  Scratch<float> values, result;
  Scratch<int32_t> top, place;
  Scratch<uint32_t> highest;

  explicit Pooled(int64_t columns)
      : values(columns), result(columns), top(columns), place(columns), highest(columns) {}

  void start(int64_t columns) {
    std::fill_n(values.get(), columns, 0.0f);
    std::fill_n(top.get(), columns, 0);
    std::fill_n(place.get(), columns, -1);
    std::fill_n(highest.get(), columns, 0u);
  }

  // The largest logits as floats in `values`, places as l.
  void settle(int64_t columns, const int32_t* places, bool any) {
    constexpr uint32_t kLowest = 0xff800000;  // -infinity: beyond are NaNs, as are some positive
    for (int64_t i = 0; i < columns; ++i) {
      float x;
      std::memcpy(&x, &top.get()[i], 4);
      int32_t t = place.get()[i];
      if (highest.get()[i] > kLowest || x != x) {
        x = std::numeric_limits<float>::quiet_NaN();
        t = 0;
      }
      values.get()[i] = x;
      place.get()[i] = t < 0 || !any ? -1 : places[t];
    }
  }
};

}  // namespace

void splade_head(const SpladeHead& head, const SpladeOutputs& outputs) {
  if (head.hidden.dtype == DType::f64) return reference_splade_head(head, outputs);
  const Tokens tokens(head, row_floats(head), true);
  const int64_t padded = tokens.step, columns = head.vocabulary(), width = kernels().width;
  const int64_t panel_bytes = width * padded * static_cast<int64_t>(sizeof(float));
  int64_t panels = std::clamp<int64_t>(kPanelBytes / panel_bytes, 1, kMostPanels);
  while (panels > 1 && ceil_div(columns, panels * width) < 4 * num_threads()) panels /= 2;
  const int64_t most = panels * width, chunk = chunk_of(padded);
  const DType dtype = head.hidden.dtype;
  const bool max = head.pooling == SpladePooling::max;
  const auto run = [&](int64_t task) {
    const int64_t v = task * most, n = std::min(most, columns - v);
    Panels packed(padded, panels);
    packed.pack(head, v, n);
    Pooled pooled(most);
    Scratch<float> logits(chunk * width);
    for (int64_t b = 0; b < head.batch(); ++b) {
      pooled.start(most);
      const int64_t count = tokens.count_of(b);
      for (int64_t t = 0; t < count; t += chunk) {
        SpladeTile tile = {};
        tile.tokens = tokens.rows + (tokens.starts[b] + t) * padded;
        tile.count = std::min(chunk, count - t), tile.step = padded, tile.dim = head.dim();
        tile.logits = logits.get();
        for (int64_t p = 0; p < packed.count(); ++p) {
          const int64_t from = p * width;
          tile.panel = packed.values.get() + from * padded;
          tile.bias = packed.bias.get() + from;
          if (max)
            kernels().max({tile, static_cast<int32_t>(t), pooled.top.get() + from,
                           pooled.place.get() + from, pooled.highest.get() + from});
          else kernels().sum({tile, head.activation, pooled.values.get() + from});
        }
      }
      const int64_t to = b * columns + v;
      const float* result = pooled.values.get();
      if (max) {
        pooled.settle(n, tokens.places.get() + tokens.starts[b], count > 0);
        if (outputs.top) std::copy_n(result, n, static_cast<float*>(outputs.top) + to);
        if (outputs.place) std::copy_n(pooled.place.get(), n, outputs.place + to);
        kernels().activate(result, n, head.activation, pooled.result.get());
        result = pooled.result.get();
      }
      kernels().narrow(result, n, dtype, static_cast<char*>(outputs.out) + to * size_of(dtype));
    }
  };
  parallel_for_if(worth(head, tokens.count()), ceil_div(columns, most), run);
}

// --- Backward of max pooling
// ----------------------------------------------------------------------

namespace {

// The pairs (sequence, column) with a gradient, of groups of sequences, by column.
struct Entries {
  int64_t groups = 0;
  std::vector<int64_t> token_starts;  // of each group
  std::vector<int64_t> starts;        // [groups][V + 1], positions of all
  Scratch<int32_t> rows;              // number of the token
  Scratch<float> factors;
  std::vector<SpladeEntries> views;

  Entries(const SpladeHead& head, const Tokens& tokens, const SpladeGradients& gradients) {
    const int64_t batch = head.batch(), columns = head.vocabulary();
    const int64_t length = std::max<int64_t>(1, head.length());
    const int64_t sequences = std::max<int64_t>(1, kGroupTokens / length);
    groups = ceil_div(batch, sequences);
    for (int64_t g = 0; g <= groups; ++g)
      token_starts.push_back(tokens.starts[std::min(batch, g * sequences)]);
    // The number of each token among those with mask 1.
    std::vector<int32_t> numbers(batch * length, -1);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = tokens.starts[b]; t < tokens.starts[b + 1]; ++t)
        numbers[b * length + tokens.places.get()[t]] = static_cast<int32_t>(t);
    starts.assign(groups * (columns + 1), 0);
    const float* top = static_cast<const float*>(gradients.top);
    const TensorView& d_out = gradients.d_out;
    const int64_t blocks = ceil_div(columns, kBlockColumns);
    std::atomic<bool> bad{false};
    const auto each = [&](int64_t task, auto&& visit) {
      const int64_t g = task / blocks, v = task % blocks * kBlockColumns;
      const int64_t n = std::min(kBlockColumns, columns - v);
      float given[kBlockColumns];
      for (int64_t b = g * sequences; b < std::min(batch, (g + 1) * sequences); ++b) {
        kernels().widen(at(d_out, b * d_out.strides[0] + v * d_out.strides[1]), d_out.dtype,
                        d_out.strides[1], n, given);
        for (int64_t i = 0; i < n; ++i) {
          const int32_t l = gradients.place[b * columns + v + i];
          if (l == -1 || given[i] == 0) continue;
          const int32_t row = l < 0 || l >= head.length() ? -1 : numbers[b * length + l];
          if (row < 0) bad = true;
          else
            visit(g, v + i, row, given[i] * derivative(top[b * columns + v + i], head.activation));
        }
      }
    };
    const bool many = batch * columns > kSerialWork;
    parallel_for_if(many, groups * blocks, [&](int64_t task) {
      each(task, [&](int64_t g, int64_t v, int32_t, float) { ++starts[g * (columns + 1) + v]; });
    });
    if (bad) throw std::invalid_argument("[sparse.splade_head] place is no token with mask 1");
    int64_t total = 0;
    for (int64_t& start : starts) total += std::exchange(start, total);
    rows = Scratch<int32_t>(total);
    factors = Scratch<float>(total);
    parallel_for_if(many, groups * blocks, [&](int64_t task) {
      const int64_t g = task / blocks, first = task % blocks * kBlockColumns;
      const int64_t* begin = starts.data() + g * (columns + 1) + first;
      std::vector<int64_t> next(begin, begin + std::min(kBlockColumns, columns - first));
      // The arrays may have changed since they were counted: no more entries than then, and empty
      // ones for those that are gone.
      each(task, [&](int64_t, int64_t v, int32_t row, float factor) {
        const int64_t e = next[v - first];
        if (e == begin[v - first + 1]) return;
        rows.get()[e] = row;
        factors.get()[e] = factor;
        ++next[v - first];
      });
      for (size_t i = 0; i < next.size(); ++i)
        for (int64_t e = next[i]; e < begin[i + 1]; ++e) {
          rows.get()[e] = static_cast<int32_t>(token_starts[g]);
          factors.get()[e] = 0;
        }
    });
    for (int64_t g = 0; g < groups; ++g)
      views.push_back({starts.data() + g * (columns + 1), rows.get(), factors.get()});
  }
};

void max_backward(const SpladeHead& head, const SpladeGradients& gradients) {
  const Tokens tokens(head, kSpan, gradients.d_weight != nullptr);
  const int64_t dim = head.dim(), columns = head.vocabulary(), count = tokens.count();
  const Entries entries(head, tokens, gradients);
  const DType dtype = head.hidden.dtype;
  const bool many = worth(head, head.batch());
  if (gradients.d_weight && dim) {
    const int64_t blocks = std::max<int64_t>(1, 4 * num_threads() / tokens.spans);
    parallel_for_if(many, tokens.spans * blocks, [&](int64_t task) {
      const int64_t span = task / blocks, block = task % blocks;
      kernels().gather({entries.views.data(), entries.groups, columns * block / blocks,
                        columns * (block + 1) / blocks, tokens.rows + span * count * kSpan, kSpan,
                        span * kSpan, std::min(kSpan, dim - span * kSpan),
                        static_cast<char*>(gradients.d_weight), dtype, dim});
    });
  }
  if (gradients.d_bias) {
    parallel_for_if(many, ceil_div(columns, kBlockColumns), [&](int64_t task) {
      const int64_t v = task * kBlockColumns, n = std::min(kBlockColumns, columns - v);
      float sums[kBlockColumns] = {};
      for (int64_t i = 0; i < n; ++i)
        for (const SpladeEntries& group : entries.views)
          for (int64_t e = group.starts[v + i]; e < group.starts[v + i + 1]; ++e)
            sums[i] += group.factors[e];
      kernels().narrow(sums, n, dtype, static_cast<char*>(gradients.d_bias) + v * size_of(dtype));
    });
  }
  if (gradients.d_hidden) {
    Scratch<float> sums(tokens.floats());
    int64_t width = kSpan;  // of the columns of one task
    while (width > kPad && entries.groups * ceil_div(dim, width) < 2 * num_threads()) width /= 2;
    const int64_t parts = ceil_div(dim, width);
    const TensorView& w = head.weight;
    parallel_for_if(many, entries.groups * parts, [&](int64_t task) {
      const int64_t g = task / parts, from = task % parts * width;
      float* to = sums.get() + from / kSpan * count * kSpan + from % kSpan;
      for (int64_t t = entries.token_starts[g]; t < entries.token_starts[g + 1]; ++t)
        std::fill_n(to + t * kSpan, width, 0.0f);
      kernels().scatter({entries.views[g], columns, static_cast<const char*>(w.data), w.dtype,
                         w.strides[0], w.strides[1], to, kSpan, from, std::min(width, dim - from)});
    });
    tokens.write(sums.get(), gradients.d_hidden);
  }
}

// --- Backward of sum pooling
// ----------------------------------------------------------------------

void sum_backward(const SpladeHead& head, const SpladeGradients& gradients) {
  const Tokens tokens(head, row_floats(head), true);
  const int64_t dim = head.dim(), columns = head.vocabulary(), padded = tokens.step;
  const int64_t width = kernels().width, count = tokens.count(), chunk = chunk_of(padded);
  const DType dtype = head.hidden.dtype;
  const int64_t all = ceil_div(columns, width);
  const int64_t round = std::clamp<int64_t>(kSlopeFloats / (std::max<int64_t>(1, count) * width), 1,
                                            std::max<int64_t>(1, all));
  Scratch<float> slopes(round * width * count), rows(round * width * padded);
  Scratch<float> sums(gradients.d_hidden ? count * padded : 0);
  if (gradients.d_hidden) std::fill_n(sums.get(), count * padded, 0.0f);
  const TensorView& d_out = gradients.d_out;
  const bool many = worth(head, count);
  for (int64_t start = 0; start < all; start += round) {
    const int64_t panels = std::min(round, all - start);
    parallel_for_if(many, panels, [&](int64_t p) {
      const int64_t v = (start + p) * width, n = std::min(width, columns - v);
      float* weight = rows.get() + p * width * padded;
      Panels::read_rows(head, v, n, padded, weight);
      std::fill(weight + n * padded, weight + width * padded, 0.0f);
      Scratch<float> panel(width * padded), floats(3 * width);
      float *bias = floats.get(), *given = bias + width, *d_bias = given + width;
      kernels().pack(weight, width, padded, nullptr, panel.get());
      Panels::read_bias(head, v, n, width, bias);
      std::fill_n(given, 2 * width, 0.0f);
      Scratch<float> d_weight(gradients.d_weight ? width * padded : 0);
      if (gradients.d_weight) std::fill_n(d_weight.get(), width * padded, 0.0f);
      float* to = slopes.get() + p * width * count;
      for (int64_t b = 0; b < head.batch(); ++b) {
        kernels().widen(at(d_out, b * d_out.strides[0] + v * d_out.strides[1]), d_out.dtype,
                        d_out.strides[1], n, given);
        for (int64_t t = tokens.starts[b]; t < tokens.starts[b + 1]; t += chunk) {
          const int64_t some = std::min(chunk, tokens.starts[b + 1] - t);
          const float* x = tokens.rows + t * padded;
          float* logits = to + t * width;
          kernels().slope(
              {{x, some, padded, dim, panel.get(), bias, logits}, head.activation, given, d_bias});
          if (gradients.d_weight) kernels().weight_product(logits, some, x, padded, d_weight.get());
        }
      }
      if (gradients.d_weight)
        for (int64_t r = 0; r < n; ++r)
          kernels().narrow(d_weight.get() + r * padded, dim, dtype,
                           static_cast<char*>(gradients.d_weight) + (v + r) * dim * size_of(dtype));
      if (gradients.d_bias)
        kernels().narrow(d_bias, n, dtype,
                         static_cast<char*>(gradients.d_bias) + v * size_of(dtype));
    });
    if (!gradients.d_hidden) continue;
    parallel_for_if(many, ceil_div(count, chunk), [&](int64_t task) {
      const int64_t t = task * chunk, some = std::min(chunk, count - t);
      for (int64_t p = 0; p < panels; ++p)
        kernels().token_product(slopes.get() + (p * count + t) * width, some,
                                rows.get() + p * width * padded, padded, sums.get() + t * padded);
    });
  }
  if (gradients.d_hidden) tokens.write(sums.get(), gradients.d_hidden);
}

}  // namespace

void splade_head_backward(const SpladeHead& head, const SpladeGradients& gradients) {
  if (head.hidden.dtype == DType::f64) return reference_splade_head_backward(head, gradients);
  if (head.pooling == SpladePooling::max) max_backward(head, gradients);
  else sum_backward(head, gradients);
}

// --- Rows of few values
// ---------------------------------------------------------------------------

namespace {

// Positive values and NaN, which counts as infinity, by (value, column).
struct Found {
  double value;
  int64_t column;
};

bool better(const Found& a, const Found& b) {
  return a.value != b.value ? a.value > b.value : a.column < b.column;
}

bool is_zero(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(x)[i] == 0;
    case DType::f64: return static_cast<const double*>(x)[i] == 0;
    default: return (static_cast<const uint16_t*>(x)[i] & 0x7fff) == 0;
  }
}

}  // namespace

void splade_keep(void* x, DType dtype, int64_t rows, int64_t columns, int64_t k) {
  parallel_for_if(rows * columns > kSerialWork, rows, [&](int64_t r) {
    std::vector<Found> found;
    for (int64_t c = 0; c < columns; ++c) {
      if (is_zero(x, dtype, r * columns + c)) continue;
      const double value = read_real(x, dtype, r * columns + c);
      found.push_back({value != value ? std::numeric_limits<double>::infinity() : value, c});
    }
    if (static_cast<int64_t>(found.size()) <= k) return;
    std::nth_element(found.begin(), found.begin() + k, found.end(), better);
    const int64_t size = size_of(dtype);
    for (auto drop = found.begin() + k; drop != found.end(); ++drop)
      std::memset(static_cast<char*>(x) + (r * columns + drop->column) * size, 0, size);
  });
}

void splade_count(const void* x, DType dtype, int64_t rows, int64_t columns, int64_t* indptr) {
  indptr[0] = 0;
  parallel_for_if(rows * columns > kSerialWork, rows, [&](int64_t r) {
    int64_t count = 0;
    for (int64_t c = 0; c < columns; ++c) count += !is_zero(x, dtype, r * columns + c);
    indptr[r + 1] = count;
  });
  std::partial_sum(indptr, indptr + rows + 1, indptr);
}

void splade_compress(const void* x, DType dtype, int64_t rows, int64_t columns,
                     const int64_t* indptr, int64_t* indices, void* values) {
  const int64_t size = size_of(dtype);
  parallel_for_if(rows * columns > kSerialWork, rows, [&](int64_t r) {
    int64_t e = indptr[r];
    for (int64_t c = 0; c < columns && e < indptr[r + 1]; ++c) {
      const int64_t i = r * columns + c;
      if (is_zero(x, dtype, i)) continue;
      indices[e] = c;
      std::memcpy(static_cast<char*>(values) + e++ * size, static_cast<const char*>(x) + i * size,
                  size);
    }
  });
}

}  // namespace pentad::sparse
