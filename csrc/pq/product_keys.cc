// SPDX-License-Identifier: Apache-2.0
// Product-key memory, forward: tiles of query rows. The scores of a tile against one half's
// sub-keys stay in cache until their best are chosen; the rows of values follow, prefetched, when
// the tile's indices are known.
#include "pq/product_keys.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "pq/product_keys_drive.h"

namespace pentad::pq {

using product_keys_drive::address;
using product_keys_drive::kernels;

namespace {

constexpr int64_t kTileRows = 48;            // a multiple of the register block's 6
constexpr int64_t kTileScores = 128 * 1024;  // of one half

int64_t padded(int64_t n) { return ceil_div(n, kSubkeyPad) * kSubkeyPad; }

// Ranks (a, b) of the two halves that may be among the k best sums.
struct Pairs {
  std::vector<int32_t> a, b;

  Pairs(int64_t k, int64_t most) {
    for (int64_t i = 0; i < most && i < k; ++i)
      for (int64_t j = 0; j < most && (i + 1) * (j + 1) <= k; ++j) {
        a.push_back(static_cast<int32_t>(i));
        b.push_back(static_cast<int32_t>(j));
      }
  }
  int64_t size() const { return static_cast<int64_t>(a.size()); }
};

// The best of one half of a tile, [row][most], in order.
struct Best {
  Scratch<float> scores;
  Scratch<int32_t> keys;
};

class Tile {
 public:
  Tile(const ProductKeys& in, const ProductKeysOut& out, const float* panels, const Pairs& pairs,
       int64_t rows)
      : in_(in),
        out_(out),
        panels_(panels),
        pairs_(pairs),
        n_(in.keys()),
        most_(std::min(in.k, n_)),
        scores_(rows * padded(n_)),
        scratch_(std::max(7 * padded(n_), 4 * padded(pairs.size())) + 4 * kSubkeyPad),
        found_(padded(pairs.size()) + kSubkeyPad),
        row_(2 * in.dv()),
        indices_(rows * in.heads() * in.k) {
    for (Best& half : best_) {
      half.scores = Scratch<float>(rows * most_);
      half.keys = Scratch<int32_t>(rows * most_);
    }
    exponentials_.resize(in.k);
    if (in.q.dtype != DType::f32 || in.q.strides[2] != 1) q_ = Scratch<float>(rows * in.half());
  }

  void run(int64_t first, int64_t last) {
    for (int64_t head = 0; head < in_.heads(); ++head) {
      for (int half = 0; half < 2; ++half) choose_keys(head, half, first, last);
      for (int64_t row = first; row < last; ++row) choose_pairs(head, row, row - first);
    }
    std::copy_n(indices_.get(), (last - first) * in_.heads() * in_.k,
                out_.indices + first * in_.heads() * in_.k);
    sum_values(first, last);
  }

 private:
  void choose_keys(int64_t head, int half, int64_t first, int64_t last) {
    const TensorView& q = in_.q;
    const int64_t width = in_.half();
    const void* from =
        address(q, first * q.strides[0] + head * q.strides[1] + half * width * q.strides[2]);
    const float* rows = static_cast<const float*>(from);
    int64_t step = q.strides[0];
    if (q_.get()) {
      for (int64_t row = first; row < last; ++row)
        kernels().widen(
            static_cast<const char*>(from) + (row - first) * q.strides[0] * size_of(q.dtype),
            q.dtype, q.strides[2], width, q_.get() + (row - first) * width);
      rows = q_.get();
      step = width;
    }
    kernels().half_scores(rows, step, last - first,
                          panels_ + (head * 2 + half) * padded(n_) * width, n_, width,
                          scores_.get());
    for (int64_t r = 0; r < last - first; ++r)
      kernels().best_keys(scores_.get() + r * padded(n_), n_, most_, scratch_.get(),
                          best_[half].scores.get() + r * most_, best_[half].keys.get() + r * most_);
  }

  void choose_pairs(int64_t head, int64_t row, int64_t r) {
    const float* first = best_[0].scores.get() + r * most_;
    const float* second = best_[1].scores.get() + r * most_;
    const int32_t* i = best_[0].keys.get() + r * most_;
    const int32_t* j = best_[1].keys.get() + r * most_;
    const int32_t *a = pairs_.a.data(), *b = pairs_.b.data();
    int32_t* found = found_.get();
    bool ordered;
    const int64_t count = kernels().best_pairs(first, second, a, b, pairs_.size(), in_.k,
                                               scratch_.get(), found, &ordered);
    if (!ordered)
      std::partial_sort(found, found + in_.k, found + count, [&](int32_t x, int32_t y) {
        const PairSum left(first[a[x]], second[b[x]]), right(first[a[y]], second[b[y]]);
        if (left.above(right)) return true;
        if (right.above(left)) return false;
        return i[a[x]] * n_ + j[b[x]] < i[a[y]] * n_ + j[b[y]];
      });
    const int64_t entry = (row * in_.heads() + head) * in_.k;
    int64_t* index = indices_.get() + (r * in_.heads() + head) * in_.k;
    for (int64_t p = 0; p < in_.k; ++p) {
      index[p] = i[a[found[p]]] * n_ + j[b[found[p]]];
      exponentials_[p] = static_cast<double>(first[a[found[p]]]) + second[b[found[p]]];
    }
    float* weights = static_cast<float*>(out_.weights) + entry;
    double sum = 1;
    if (in_.softmax) {
      const double top = exponentials_[0];
      sum = 0;
      for (double& x : exponentials_) sum += x = std::exp(in_.scale * (x - top));
    }
    const double factor = in_.softmax ? 1 : in_.scale;
    for (int64_t p = 0; p < in_.k; ++p)
      weights[p] = static_cast<float>(factor * exponentials_[p] / sum);
  }

  void sum_values(int64_t first, int64_t last) {
    const TensorView& values = in_.values;
    const int64_t per_row = in_.per_head ? in_.heads() : 1, count = in_.per_group();
    MemoryBagJob job;
    job.rows = {values.data, values.dtype, values.strides[0], values.strides[1], in_.dv()};
    job.scratch = row_.get();
    job.out_dtype = values.dtype;
    job.count = count;
    for (int64_t group = first * per_row; group < last * per_row; ++group) {
      job.index = indices_.get() + (group - first * per_row) * count;
      job.weight = static_cast<const float*>(out_.weights) + group * count;
      job.known = (last * per_row - group) * count;
      job.out = static_cast<char*>(out_.out) + group * in_.dv() * size_of(values.dtype);
      kernels().bag(job);
    }
  }

  const ProductKeys& in_;
  const ProductKeysOut& out_;
  const float* panels_;
  const Pairs& pairs_;
  int64_t n_, most_;
  Scratch<float> scores_;
  Scratch<int32_t> scratch_;
  Scratch<int32_t> found_;
  Scratch<float> row_;
  Scratch<int64_t> indices_;  // those of out_, which may change meanwhile
  Scratch<float> q_;
  Best best_[2];
  std::vector<double> exponentials_;
};

}  // namespace

void product_keys(const ProductKeys& in, const ProductKeysOut& out) {
  if (in.wide()) return reference::product_keys(in, out, false);
  const int64_t rows = in.rows(), n = in.keys(), half = in.half();
  if (!rows) return;
  Scratch<float> panels(in.heads() * 2 * padded(n) * half);
  parallel_for(in.heads() * 2, [&](int64_t task) {
    Scratch<float> scratch(16 * half);
    const TensorView& keys = in.subkeys;
    kernels().pack_keys({address(keys, task / 2 * keys.strides[0] + task % 2 * keys.strides[1]),
                         keys.dtype, keys.strides[2], keys.strides[3], half},
                        n, panels.get() + task * padded(n) * half, scratch.get());
  });
  const Pairs pairs(in.k, std::min(in.k, n));
  int64_t tile = std::min(kTileRows, std::max<int64_t>(6, kTileScores / padded(n)));
  tile = std::min(tile, ceil_div(rows, 16));
  parallel_for(ceil_div(rows, tile), [&](int64_t task) {
    const int64_t first = task * tile, last = std::min(rows, first + tile);
    Tile(in, out, panels.get(), pairs, last - first).run(first, last);
  });
}

}  // namespace pentad::pq
