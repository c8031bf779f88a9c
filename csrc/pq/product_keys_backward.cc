// SPDX-License-Identifier: Apache-2.0
// Product-key memory, backward. The entries are sorted by value row, so that one pass reads each
// selected row of values once, in the order of memory, and makes both the gradient of that row and
// those of its weights; no two threads share a row. Only the selected sub-keys take part in what
// follows: a dense product with all of them would cost n / k times as much.
//
// Tried on an AMD EPYC (AVX-512), 4096 rows, 4 heads, k 32, 512^2 keys of 2 x 128, dv 256, one
// thread:
//   - 130 to 140 ms without the supply of fresh pages for the gradient of values (268 MB): half of
//     it the pass over the values, a quarter the queries and sub-keys, the rest the sort.
//   - The supply of pages: 130 ms by faults, 100 ms with MADV_POPULATE_WRITE, 20 ms in pages of
//     2 MiB, but 400 and more where the system has none at hand, as in a virtual machine whose host
//     takes back what is free.

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/process.h"
#include "common/scratch.h"
#include "pq/product_keys.h"
#include "pq/product_keys_drive.h"

namespace pentad::pq {

using product_keys_drive::address;
using product_keys_drive::kernels;

namespace {

constexpr int64_t kSliceEntries = 8192;  // of the entries that one task distributes
constexpr int64_t kMostBuckets = 256;
constexpr int64_t kScatterColumns = 64;
constexpr int64_t kRowsOfTask = 64;

// --- The entries by value row
// ---------------------------------------------------------------------

// (value row << 32 | entry), rising, in buckets of value rows: stable, whoever distributes them.
class SortedEntries {
 public:
  SortedEntries(const int64_t* indices, int64_t entries, int64_t value_rows)
      : value_rows_(value_rows), items_(entries), starts_(1, 0) {
    const int64_t wanted = std::clamp<int64_t>(entries / 256, 1, kMostBuckets);
    bucket_rows_ = ceil_div(value_rows, wanted);
    const int64_t buckets = ceil_div(value_rows, bucket_rows_);
    const int64_t slices = std::clamp<int64_t>(entries / kSliceEntries, 1, 64);
    const int64_t slice = ceil_div(entries, slices);
    std::vector<int64_t> next(slices * buckets);  // counts, then positions
    const auto each = [&](int64_t s, auto&& visit) {
      int64_t* mine = &next[s * buckets];
      for (int64_t e = s * slice; e < std::min(entries, (s + 1) * slice); ++e)
        visit(e, mine[static_cast<uint64_t>(indices[e]) / static_cast<uint64_t>(bucket_rows_)]);
    };
    parallel_for(slices, [&](int64_t s) { each(s, [](int64_t, int64_t& count) { ++count; }); });
    int64_t total = 0;
    for (int64_t b = 0; b < buckets; ++b) {
      for (int64_t s = 0; s < slices; ++s) total += std::exchange(next[s * buckets + b], total);
      starts_.push_back(total);
    }
    parallel_for(slices, [&](int64_t s) {
      each(s, [&](int64_t e, int64_t& position) {
        items_.get()[position++] = static_cast<uint64_t>(indices[e]) << 32 | e;
      });
    });
    distinct_.resize(buckets + 1);
    parallel_for(buckets, [&](int64_t b) { sort(b); });
    std::exclusive_scan(distinct_.begin(), distinct_.end(), distinct_.begin(), int64_t{0});
  }

  int64_t buckets() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t first_row(int64_t b) const { return std::min(value_rows_, b * bucket_rows_); }
  const uint64_t* begin(int64_t b) const { return items_.get() + starts_[b]; }
  int64_t count(int64_t b) const { return starts_[b + 1] - starts_[b]; }
  // Different rows in the buckets before b.
  int64_t distinct_before(int64_t b) const { return distinct_[b]; }

 private:
  void sort(int64_t b) {
    uint64_t* items = items_.get() + starts_[b];
    const int64_t size = count(b), rows = first_row(b + 1) - first_row(b);
    if (size * 4 < rows) {
      std::sort(items, items + size);
    } else {  // by counting
      std::vector<int64_t> next(rows + 1);
      Scratch<uint64_t> copy(size);
      std::copy_n(items, size, copy.get());
      const uint64_t* from = copy.get();
      const int64_t first = first_row(b);
      for (int64_t i = 0; i < size; ++i) ++next[static_cast<int64_t>(from[i] >> 32) - first + 1];
      std::partial_sum(next.begin(), next.end(), next.begin());
      for (int64_t i = 0; i < size; ++i)
        items[next[static_cast<int64_t>(from[i] >> 32) - first]++] = from[i];
    }
    int64_t different = 0;
    for (int64_t i = 0; i < size; ++i) different += !i || items[i] >> 32 != items[i - 1] >> 32;
    distinct_[b] = different;
  }

  int64_t value_rows_, bucket_rows_;
  Scratch<uint64_t> items_;
  std::vector<int64_t> starts_, distinct_;
};

// --- Values and weights
// ---------------------------------------------------------------------------

// d_out as contiguous float32: where it lies, or a copy.
const float* contiguous(const TensorView& d_out, int64_t groups, int64_t dv, Scratch<float>& copy) {
  if (d_out.data && d_out.dtype == DType::f32 && d_out.strides[1] == 1 && d_out.strides[0] == dv)
    return static_cast<const float*>(d_out.data);
  copy = Scratch<float>(groups * dv);
  parallel_for(ceil_div(groups, kRowsOfTask), [&](int64_t task) {
    for (int64_t g = task * kRowsOfTask; g < std::min(groups, (task + 1) * kRowsOfTask); ++g) {
      float* to = copy.get() + g * dv;
      if (d_out.data)
        kernels().widen(address(d_out, g * d_out.strides[0]), d_out.dtype, d_out.strides[1], dv,
                        to);
      else std::fill_n(to, dv, 0.0f);
    }
  });
  return copy.get();
}

// d_weights (in which there may be something already), and the gradient of values.
void value_gradients(const ProductKeys& in, const ProductKeysGrad& grad, float* d_weights) {
  const int64_t n = in.keys(), dv = in.dv();
  Scratch<float> copy;
  const float* d_out = contiguous(grad.d_out, in.groups(), dv, copy);
  const SortedEntries sorted(grad.indices, in.entries(), n * n);
  parallel_for(sorted.buckets(), [&](int64_t b) {
    Scratch<float> scratch(2 * dv);
    MemoryGradJob job;
    job.entries = sorted.begin(b);
    job.count = sorted.count(b);
    job.first = sorted.first_row(b);
    job.last = sorted.first_row(b + 1);
    const TensorView& values = in.values;
    job.values = {values.data, values.dtype, values.strides[0], values.strides[1], dv};
    job.d_out = d_out;
    job.per_group = static_cast<uint32_t>(in.per_group());
    job.weights = static_cast<const float*>(grad.weights);
    job.d_weights = d_weights;
    job.touched = grad.touched ? grad.touched + sorted.distinct_before(b) : nullptr;
    const int64_t row = grad.touched ? sorted.distinct_before(b) : job.first;
    job.d_values = grad.d_values ? address(grad.d_values, values.dtype, row * dv) : nullptr;
    job.scratch = scratch.get();
    const int64_t next = grad.touched ? sorted.distinct_before(b + 1) : job.last;
    if (job.d_values) supply_pages(job.d_values, (next - row) * dv * size_of(values.dtype));
    kernels().value_gradients(job);
  });
}

// --- Queries and sub-keys
// -------------------------------------------------------------------------

// For each half of each head, the sub-keys that each row selected and the gradients of their
// scores: [head * 2 + half][row][most], in the order in which they first occur.
struct Selected {
  int64_t rows, most;
  Scratch<int32_t> keys, used;
  Scratch<float> gradients;

  Selected(const ProductKeys& in)
      : rows(in.rows()),
        most(std::min(in.k, in.keys())),
        keys(in.heads() * 2 * rows * most),
        used(in.heads() * 2 * rows),
        gradients(in.heads() * 2 * rows * most) {}
};

// The gradients of one head's scores from those of its weights, by the best k of one row.
void score_gradients(const ProductKeys& in, const float* weights, const float* d_weights,
                     std::vector<float>& d_scores) {
  double mean = 0;
  if (in.softmax)
    for (int64_t p = 0; p < in.k; ++p) mean += static_cast<double>(weights[p]) * d_weights[p];
  for (int64_t p = 0; p < in.k; ++p)
    d_scores[p] = static_cast<float>(in.softmax ? in.scale * weights[p] * (d_weights[p] - mean)
                                                : in.scale * d_weights[p]);
}

void select(const ProductKeys& in, const ProductKeysGrad& grad, const float* d_weights,
            const Selected& selected) {
  const int64_t rows = in.rows(), heads = in.heads(), n = in.keys(), most = selected.most;
  parallel_for(ceil_div(rows, kRowsOfTask), [&](int64_t task) {
    std::vector<int32_t> slots(n, -1);
    std::vector<float> d_scores(in.k);
    std::vector<int64_t> index(most);
    Scratch<float> scratch(2 * in.half());
    for (int64_t row = task * kRowsOfTask; row < std::min(rows, (task + 1) * kRowsOfTask); ++row)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t entry = (row * heads + head) * in.k;
        score_gradients(in, static_cast<const float*>(grad.weights) + entry, d_weights + entry,
                        d_scores);
        for (int half = 0; half < 2; ++half) {
          const int64_t place = (head * 2 + half) * rows + row;
          int32_t* keys = selected.keys.get() + place * most;
          float* gradients = selected.gradients.get() + place * most;
          int32_t used = 0;
          for (int64_t p = 0; p < in.k; ++p) {
            const int64_t value = grad.indices[entry + p];
            const int32_t key = static_cast<int32_t>(half ? value % n : value / n);
            int32_t& slot = slots[key];
            if (slot < 0) {
              slot = used++;
              keys[slot] = key;
              gradients[slot] = 0;
            }
            gradients[slot] += d_scores[p];
          }
          selected.used.get()[place] = used;
          for (int32_t i = 0; i < used; ++i) slots[keys[i]] = -1;
          if (!grad.d_q) continue;
          std::copy_n(keys, used, index.begin());
          const TensorView& subkeys = in.subkeys;
          MemoryBagJob job;
          job.rows = {address(subkeys, head * subkeys.strides[0] + half * subkeys.strides[1]),
                      subkeys.dtype, subkeys.strides[2], subkeys.strides[3], in.half()};
          job.index = index.data();
          job.weight = gradients;
          job.count = job.known = used;
          job.scratch = scratch.get();
          job.out = address(grad.d_q, in.q.dtype, ((row * heads + head) * 2 + half) * in.half());
          job.out_dtype = in.q.dtype;
          kernels().bag(job);
        }
      }
  });
}

// A thread owns some columns of one half's gradient and goes through all rows.
void subkey_gradients(const ProductKeys& in, void* d_subkeys, const Selected& selected) {
  const int64_t n = in.keys(), half = in.half(), parts = ceil_div(half, kScatterColumns);
  parallel_for(in.heads() * 2 * parts, [&](int64_t task) {
    const int64_t which = task / parts, column = task % parts * kScatterColumns;
    const int64_t width = std::min(kScatterColumns, half - column);
    Scratch<float> sums(n * width);
    std::fill_n(sums.get(), n * width, 0.0f);
    const TensorView& q = in.q;
    SubkeyScatterJob job;
    job.rows = {address(q, which / 2 * q.strides[1] + (which % 2 * half + column) * q.strides[2]),
                q.dtype, q.strides[0], q.strides[2], width};
    job.count = selected.rows;
    job.most = selected.most;
    job.used = selected.used.get() + which * selected.rows;
    job.keys = selected.keys.get() + which * selected.rows * selected.most;
    job.coefficients = selected.gradients.get() + which * selected.rows * selected.most;
    job.accumulators = sums.get();
    job.width = width;
    kernels().scatter(job);
    for (int64_t key = 0; key < n; ++key)
      kernels().narrow(sums.get() + key * width, width, in.subkeys.dtype,
                       address(d_subkeys, in.subkeys.dtype, (which * n + key) * half + column));
  });
}

}  // namespace

void product_keys_backward(const ProductKeys& in, const ProductKeysGrad& grad) {
  if (in.wide()) return reference::product_keys_backward(in, grad);
  const bool scores = grad.d_q || grad.d_subkeys;
  Scratch<float> d_weights;
  if (scores) {
    d_weights = Scratch<float>(in.entries());
    if (grad.d_weights)
      std::copy_n(static_cast<const float*>(grad.d_weights), in.entries(), d_weights.get());
    else std::fill_n(d_weights.get(), in.entries(), 0.0f);
  }
  if (grad.d_values || (scores && grad.d_out.data)) value_gradients(in, grad, d_weights.get());
  if (!scores) return;
  const Selected selected(in);
  select(in, grad, d_weights.get(), selected);
  if (grad.d_subkeys) subkey_gradients(in, grad.d_subkeys, selected);
}

int64_t count_distinct(const int64_t* indices, int64_t count, int64_t limit) {
  std::vector<uint64_t> seen(ceil_div(limit, 64));
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t& word = seen[indices[i] >> 6];
    const uint64_t bit = uint64_t{1} << (indices[i] & 63);
    distinct += !(word & bit);
    word |= bit;
  }
  return distinct;
}

}  // namespace pentad::pq
