// SPDX-License-Identifier: Apache-2.0
// Cuts recurrences of matrix states into jobs: a sequence, and some heads of one group, which share
// the products of its queries and keys. Every head's states are its own, so the forward pass may be
// cut anywhere. The backward pass sums over heads (dq, dk) and over sequences (dd): its pieces
// depend on the shapes alone, and are added in order.
#include "scan/matrix_scan.h"

#include <algorithm>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/matrix_steps.h"
#include "scan/scan_drive.h"

namespace pentad::scan {
namespace {

// Heads of a backward job: those of a group share one third as much work as one has of its own, and
// their states (32 KB of 128 keys and 64 values) should stay in L2.
constexpr int64_t kHeads = 6;

void* moved(const Operand& x, int64_t elements) {
  return x.data ? static_cast<char*>(x.data) + elements * size_of(x.dtype) : nullptr;
}

// Sequence s: where its first step in scan order lies.
struct Sequence {
  int64_t batch, first, steps, chunk;  // chunk: its first among the stored ones
};
Sequence sequence(const MatrixScan& p, int64_t s) {
  Sequence q = {s, 0, p.length, s * ceil_div(p.length, kMatrixChunk)};
  if (!p.begin.empty())
    q = {0, p.begin[s], p.begin[s + 1] - p.begin[s], p.begin[s] / kMatrixChunk + s};
  if (p.reverse) q.first += q.steps - 1;
  return q;
}

// (b, t, h or g, column) from head or group `index` on.
Rows steps_of(const MatrixScan& p, const Operand& x, const Sequence& q, int64_t index) {
  const int64_t first = q.batch * x.stride[0] + q.first * x.stride[1] + index * x.stride[2];
  return {moved(x, first), x.dtype, x.stride[2], p.reverse ? -x.stride[1] : x.stride[1],
          x.stride[3]};
}
// (sequence, h, n, p) from head `index` on.
Rows states_of(const Operand& x, int64_t s, int64_t index) {
  return {moved(x, s * x.stride[0] + index * x.stride[1]), x.dtype, x.stride[1], x.stride[2],
          x.stride[3]};
}

// Some heads [first, first + count) of a sequence.
struct Share {
  int64_t sequence, group, first, count, piece;
};
class Shares {
 public:
  Shares(const MatrixScan& p, int64_t most_heads) : groups_(p.groups) {
    per_group_ = p.heads / p.groups;
    pieces_ = ceil_div(per_group_, most_heads);
    count_ = p.sequences() * groups_ * pieces_;
  }
  int64_t count() const { return count_; }
  int64_t pieces() const { return pieces_; }  // of one group
  Share operator[](int64_t i) const {
    const int64_t piece = i % pieces_, group = i / pieces_ % groups_;
    const int64_t first = per_group_ * piece / pieces_, end = per_group_ * (piece + 1) / pieces_;
    return {i / pieces_ / groups_, group, group * per_group_ + first, end - first, piece};
  }

 private:
  int64_t groups_, per_group_, pieces_, count_;
};

MatrixJob job_of(const MatrixScan& p, const Share& share, const float* stored, float* scratch) {
  const Sequence q = sequence(p, share.sequence);
  MatrixJob job = {};
  job.steps = q.steps;
  job.heads = share.count;
  job.keys = p.keys;
  job.values = p.values;
  job.delta = p.delta;
  job.scale = static_cast<float>(p.scale);
  job.q = steps_of(p, p.q, q, share.group);
  job.k = steps_of(p, p.k, q, share.group);
  job.v = steps_of(p, p.v, q, share.first);
  job.a = steps_of(p, p.a, q, share.first);
  job.w = steps_of(p, p.w, q, share.first);
  job.d = {moved(p.d, share.first * p.d.stride[0]), p.d.dtype, p.d.stride[0], 0, p.d.stride[1]};
  job.initial = states_of(p.initial, share.sequence, share.first);
  job.stored_step = p.heads * p.keys * p.values;
  job.stored = const_cast<float*>(stored);
  if (stored) job.stored += q.chunk * job.stored_step + share.first * p.keys * p.values;
  job.scratch = scratch;
  return job;
}

int64_t multiply_adds(const MatrixScan& p) {
  return p.batch * p.length * p.heads * 2 * p.keys * p.values;
}

}  // namespace

void matrix_scan_forward(const MatrixScan& p, const Operand& out, const Operand& last,
                         float* stored) {
  if (p.v.dtype == DType::f64) return reference_matrix_scan_forward(p, out, last);
  if (p.key_decay) return matrix_steps_forward(p, out, last, stored);
  int64_t most = std::max<int64_t>(p.heads / p.groups, 1);
  while (most > 1 && Shares(p, most).count() < 3 * num_threads()) most = ceil_div(most, 2);
  const Shares shares(p, most);
  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    Scratch<float> scratch(matrix_scratch(share.count, p.keys, p.values, false));
    MatrixForwardJob job = {};
    job.scan = job_of(p, share, stored, scratch.get());
    job.out = steps_of(p, out, sequence(p, share.sequence), share.first);
    job.last = states_of(last, share.sequence, share.first);
    kernels().matrix_forward(job);
  });
}

void matrix_scan_backward(const MatrixScan& p, const MatrixScanGradients& g) {
  if (p.v.dtype == DType::f64 || p.heads == 0) return reference_matrix_scan_backward(p, g);
  if (p.key_decay) return matrix_steps_backward(p, g);
  const Shares shares(p, kHeads);
  const int64_t pieces = shares.pieces();

  // dq and dk of each piece of a group, [piece][b][t][g][n], where there are several.
  const int64_t group_rows = p.batch * p.length * p.groups, part = group_rows * p.keys;
  const bool apart = pieces > 1;
  Scratch<float> dq_parts(apart && g.dq.data ? pieces * part : 0);
  Scratch<float> dk_parts(apart && g.dk.data ? pieces * part : 0);
  const auto target = [&](const Operand& x, float* parts, const Share& share) -> Rows {
    if (!x.data) return {};
    const Sequence q = sequence(p, share.sequence);
    if (!apart) return steps_of(p, x, q, share.group);
    const int64_t step = p.groups * p.keys;
    const Operand own = {
        parts + share.piece * part, DType::f32, {p.length * step, step, p.keys, 1}};
    return steps_of(p, own, q, share.group);
  };
  // dd of each sequence, [sequence][h][p].
  const int64_t skips = g.dd.data ? p.heads * p.values : 0;
  Scratch<float> dd_parts(p.sequences() * skips);
  std::fill_n(dd_parts.get(), p.sequences() * skips, 0.0f);

  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    const Sequence q = sequence(p, share.sequence);
    Scratch<float> scratch(matrix_scratch(share.count, p.keys, p.values, true));
    MatrixBackwardJob job = {};
    job.scan = job_of(p, share, g.stored, scratch.get());
    job.d_out = steps_of(p, g.d_out, q, share.first);
    job.d_last = states_of(g.d_last, share.sequence, share.first);
    job.dq = target(g.dq, dq_parts.get(), share);
    job.dk = target(g.dk, dk_parts.get(), share);
    job.dv = steps_of(p, g.dv, q, share.first);
    job.da = steps_of(p, g.da, q, share.first);
    job.dw = steps_of(p, g.dw, q, share.first);
    job.dinitial = states_of(g.dinitial, share.sequence, share.first);
    if (skips)
      job.dd = {dd_parts.get() + share.sequence * skips + share.first * p.values, DType::f32,
                p.values, 0, 1};
    kernels().matrix_backward(job);
  });

  const auto add_pieces = [&](const Operand& x, const float* parts) {
    if (!apart || !x.data) return;
    constexpr int64_t kRows = 64;
    for_tasks(part * pieces, p.batch * p.groups * ceil_div(p.length, kRows), [&](int64_t i) {
      const int64_t blocks = ceil_div(p.length, kRows), group = i / blocks % p.groups;
      const int64_t b = i / blocks / p.groups, t = i % blocks * kRows;
      MatrixSumJob job = {};
      job.parts = parts + ((b * p.length + t) * p.groups + group) * p.keys;
      job.pieces = pieces;
      job.piece = part;
      job.row = p.groups * p.keys;
      job.rows = std::min(kRows, p.length - t);
      job.columns = p.keys;
      job.out = {moved(x, b * x.stride[0] + t * x.stride[1] + group * x.stride[2]), x.dtype, 0,
                 x.stride[1], x.stride[3]};
      kernels().matrix_sum(job);
    });
  };
  add_pieces(g.dq, dq_parts.get());
  add_pieces(g.dk, dk_parts.get());
  for (int64_t i = 0; i < skips; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < p.sequences(); ++s) sum += dd_parts.get()[s * skips + i];
    static_cast<float*>(g.dd.data)[i / p.values * g.dd.stride[0] + i % p.values * g.dd.stride[1]] =
        sum;
  }
}

}  // namespace pentad::scan
