// SPDX-License-Identifier: Apache-2.0
// What the drivers of matrix states share: jobs of some heads and value columns of a sequence, and
// the sums of which every job has a part.
#pragma once
#include <algorithm>

#include "common/scratch.h"
#include "scan/matrix_scan.h"
#include "scan/operands.h"
#include "scan/scan_drive.h"

namespace pentad::scan {

// (b, t, h or g, column) from head or group `index` on, and from `column` on.
inline Rows steps_of(const MatrixScan& p, const Operand& x, const Sequence& q, int64_t index,
                     int64_t column = 0) {
  const int64_t first = q.batch * x.stride[0] + q.first * x.stride[1] + index * x.stride[2];
  return {moved(x, first + column * x.stride[3]), x.dtype, x.stride[2],
          p.reverse ? -x.stride[1] : x.stride[1], x.stride[3]};
}
// (sequence, h, n, p) from `head` on, and from `column` on.
inline Rows states_of(const Operand& x, int64_t s, int64_t head, int64_t column = 0) {
  const int64_t first = s * x.stride[0] + head * x.stride[1] + column * x.stride[3];
  return {moved(x, first), x.dtype, x.stride[1], x.stride[2], x.stride[3]};
}

// Heads [head, head + heads) of sequence s, value columns [column, column + columns); without q and
// k, whose rows depend on how heads are shared out.
inline MatrixJob matrix_job(const MatrixScan& p, int64_t s, int64_t head, int64_t heads,
                            int64_t column, int64_t columns, const float* stored, float* scratch) {
  const Sequence q = sequence(p, s, kMatrixChunk);
  MatrixJob job = {};
  job.steps = q.steps;
  job.heads = heads;
  job.keys = p.keys;
  job.values = columns;
  job.delta = p.delta;
  job.scale = static_cast<float>(p.scale);
  job.v = steps_of(p, p.v, q, head, column);
  job.a = steps_of(p, p.a, q, head);
  job.w = steps_of(p, p.w, q, head);
  const int64_t* d = p.d.stride;
  job.d = {moved(p.d, head * d[0] + column * d[1]), p.d.dtype, d[0], 0, d[1]};
  job.initial = states_of(p.initial, s, head, column);
  job.stored_step = p.heads * p.keys * p.values;
  job.stored = const_cast<float*>(stored);
  if (stored) job.stored += q.chunk * job.stored_step + head * p.keys * p.values + column;
  job.scratch = scratch;
  return job;
}

// A gradient (b, t, set, column) of which jobs have parts, [piece][b][t][set][column] where there
// are several pieces, to be added in order.
class StepSums {
 public:
  StepSums(const MatrixScan& p, const Operand& x, int64_t sets, int64_t columns, int64_t pieces)
      : p_(p),
        x_(x),
        sets_(sets),
        columns_(columns),
        pieces_(pieces),
        size_(p.batch * p.length * sets * columns),
        parts_(apart() ? pieces * size_ : 0) {}

  // Set `set` of piece `piece`. The next head's is the next set of the same piece, or the same set
  // of the piece that is `next_piece` further.
  Rows target(const Sequence& q, int64_t set, int64_t piece, int64_t next_piece = 0) const {
    if (!x_.data) return {};
    if (!apart()) return steps_of(p_, x_, q, set);
    const int64_t step = sets_ * columns_;
    const Operand own = {
        parts_.get() + piece * size_, DType::f32, {p_.length * step, step, columns_, 1}};
    Rows rows = steps_of(p_, own, q, set);
    if (next_piece) rows.head = next_piece * size_;
    return rows;
  }

  void add() const {
    if (!apart()) return;
    constexpr int64_t kRows = 64;
    const int64_t blocks = ceil_div(p_.length, kRows);
    for_tasks(size_ * pieces_, p_.batch * sets_ * blocks, [&](int64_t i) {
      const int64_t set = i / blocks % sets_, b = i / blocks / sets_, t = i % blocks * kRows;
      MatrixSumJob job = {};
      job.parts = parts_.get() + ((b * p_.length + t) * sets_ + set) * columns_;
      job.pieces = pieces_;
      job.piece = size_;
      job.row = sets_ * columns_;
      job.rows = std::min(kRows, p_.length - t);
      job.columns = columns_;
      job.out = {moved(x_, b * x_.stride[0] + t * x_.stride[1] + set * x_.stride[2]), x_.dtype, 0,
                 x_.stride[1], x_.stride[3]};
      kernels().matrix_sum(job);
    });
  }

 private:
  bool apart() const { return x_.data && pieces_ > 1; }

  const MatrixScan& p_;
  const Operand& x_;
  int64_t sets_, columns_, pieces_, size_;
  Scratch<float> parts_;
};

// dd, [sequence][h][p] until it is added in order.
class SkipSums {
 public:
  SkipSums(const MatrixScan& p, const Operand& x)
      : p_(p), x_(x), size_(x.data ? p.heads * p.values : 0), parts_(p.sequences() * size_) {
    std::fill_n(parts_.get(), p.sequences() * size_, 0.0f);
  }

  Rows target(int64_t s, int64_t head, int64_t column = 0) const {
    if (!x_.data) return {};
    return {parts_.get() + s * size_ + head * p_.values + column, DType::f32, p_.values, 0, 1};
  }

  void add() const {
    constexpr int64_t kColumns = 1024;
    for_tasks(p_.sequences() * size_, ceil_div(size_, kColumns), [&](int64_t i) {
      const int64_t first = i * kColumns, count = std::min(kColumns, size_ - first);
      float sums[kColumns] = {};
      for (int64_t s = 0; s < p_.sequences(); ++s) {
        const float* part = parts_.get() + s * size_ + first;
        for (int64_t c = 0; c < count; ++c) sums[c] += part[c];
      }
      for (int64_t c = 0; c < count; ++c) {
        const int64_t h = (first + c) / p_.values, column = (first + c) % p_.values;
        static_cast<float*>(x_.data)[h * x_.stride[0] + column * x_.stride[1]] = sums[c];
      }
    });
  }

 private:
  const MatrixScan& p_;
  const Operand& x_;
  int64_t size_;
  Scratch<float> parts_;
};

}  // namespace pentad::scan
