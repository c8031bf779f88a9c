// SPDX-License-Identifier: Apache-2.0
// Cuts recurrences with one decay per key into jobs: a sequence, and some heads or some value
// columns of one, whose states are their own. The backward pass sums over columns (dq, dk, da, dw),
// over the heads of a group (dq, dk) and over sequences (dd): its pieces depend on the shapes
// alone, and are added in order.
#include "scan/matrix_steps.h"

#include <algorithm>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/matrix_steps_kernels.h"
#include "scan/scan_drive.h"

namespace pentad::scan {
namespace {

constexpr int64_t kStateBytes = 1 << 18;  // of the heads of a job, in L2
constexpr int64_t kFewTasks = 4;          // sequences and heads below which columns are cut too
constexpr int64_t kLeastColumns = 32;  // of a backward job: what keys alone cost is a quarter of it

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

// (b, t, h or g, column) from head or group `index` on, and from `column` on.
Rows steps_of(const MatrixScan& p, const Operand& x, const Sequence& q, int64_t index,
              int64_t column = 0) {
  const int64_t first = q.batch * x.stride[0] + q.first * x.stride[1] + index * x.stride[2];
  return {moved(x, first + column * x.stride[3]), x.dtype, x.stride[2],
          p.reverse ? -x.stride[1] : x.stride[1], x.stride[3]};
}

// Heads [head, head + heads) of a sequence, columns [first, first + columns).
struct Share {
  int64_t sequence, head, heads, first, columns, part;  // part: which columns
};
struct Shares {
  const MatrixScan& p;
  int64_t heads, parts;  // heads: of a share; parts: of the columns

  // Heads whose states stay in L2 go together where there are enough tasks: rows of one head alone
  // are too far apart. No bit depends on it.
  Shares(const MatrixScan& p, int64_t parts, int64_t state_bytes) : p(p), heads(1), parts(parts) {
    const int64_t unit = p.groups == p.heads ? p.heads : p.heads / p.groups;
    for (int64_t more = 2; more <= unit && parts == 1; ++more)
      if (unit % more == 0 && more * state_bytes <= kStateBytes &&
          p.sequences() * p.heads / more >= 2 * num_threads())
        heads = more;
  }
  int64_t count() const { return p.sequences() * (p.heads / heads) * parts; }
  Share operator[](int64_t i) const {
    const int64_t part = i % parts, head = i / parts % (p.heads / heads) * heads;
    const int64_t first = p.values * part / parts, end = p.values * (part + 1) / parts;
    return {i / parts / (p.heads / heads), head, heads, first, end - first, part};
  }
};

// q, k: a head's group.
Rows group_steps(const MatrixScan& p, const Operand& x, const Sequence& q, const Share& share) {
  Rows rows = steps_of(p, x, q, share.head / (p.heads / p.groups));
  if (p.groups != p.heads) rows.head = 0;
  return rows;
}

Rows states_of(const Operand& x, const Share& share) {
  const int64_t first = share.sequence * x.stride[0] + share.head * x.stride[1];
  return {moved(x, first + share.first * x.stride[3]), x.dtype, x.stride[1], x.stride[2],
          x.stride[3]};
}

MatrixJob job_of(const MatrixScan& p, const Share& share, const float* stored, float* scratch) {
  const Sequence q = sequence(p, share.sequence);
  MatrixJob job = {};
  job.steps = q.steps;
  job.heads = share.heads;
  job.keys = p.keys;
  job.values = share.columns;
  job.delta = p.delta;
  job.scale = static_cast<float>(p.scale);
  job.q = group_steps(p, p.q, q, share);
  job.k = group_steps(p, p.k, q, share);
  job.v = steps_of(p, p.v, q, share.head, share.first);
  job.a = steps_of(p, p.a, q, share.head);
  job.w = steps_of(p, p.w, q, share.head);
  job.d = {moved(p.d, share.head * p.d.stride[0] + share.first * p.d.stride[1]), p.d.dtype,
           p.d.stride[0], 0, p.d.stride[1]};
  job.initial = states_of(p.initial, share);
  job.stored_step = p.heads * p.keys * p.values;
  job.stored = const_cast<float*>(stored);
  if (stored)
    job.stored += q.chunk * job.stored_step + share.head * p.keys * p.values + share.first;
  job.scratch = scratch;
  return job;
}

int64_t multiply_adds(const MatrixScan& p) {
  return p.batch * p.length * p.heads * 3 * p.keys * p.values;
}

}  // namespace

void matrix_steps_forward(const MatrixScan& p, const Operand& out, const Operand& last,
                          float* stored) {
  if (p.heads == 0) return;
  const int64_t lanes = kernels().lanes, all = p.sequences() * p.heads;
  int64_t parts = 1;
  while (p.values / parts > 2 * lanes && all * parts < 3 * num_threads() &&
         all * parts % num_threads() != 0)
    parts *= 2;
  const Shares shares(p, parts, p.keys * p.values * 4);
  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    Scratch<float> scratch(matrix_steps_scratch(share.heads, p.keys, share.columns, false));
    MatrixForwardJob job = {};
    job.scan = job_of(p, share, stored, scratch.get());
    job.out = steps_of(p, out, sequence(p, share.sequence), share.head, share.first);
    job.last = states_of(last, share);
    kernels().matrix_steps_forward(job, p.values);
  });
}

void matrix_steps_backward(const MatrixScan& p, const MatrixScanGradients& g) {
  if (p.heads == 0) return reference_matrix_scan_backward(p, g);
  const int64_t all = p.sequences() * p.heads, per_group = p.heads / p.groups;
  const int64_t parts =
      all == 0 || all >= kFewTasks
          ? 1
          : std::min(ceil_div(kFewTasks, all), std::max<int64_t>(p.values / kLeastColumns, 1));
  const Shares shares(p, parts, 2 * p.keys * p.values * 4);

  // Sums of which a job has a part: [piece][b][t][group or head][column], where there are several.
  struct PartSums {
    const Operand& x;
    int64_t sets, columns, pieces;
    Scratch<float> sums;
    PartSums(const MatrixScan& p, const Operand& x, int64_t sets, int64_t columns, int64_t pieces)
        : x(x),
          sets(sets),
          columns(columns),
          pieces(pieces),
          sums(apart() ? pieces * size(p) : 0) {}
    bool apart() const { return x.data && pieces > 1; }
    int64_t size(const MatrixScan& p) const { return p.batch * p.length * sets * columns; }
    // Set `set` of piece `piece`; the next head's is the next set of the same piece, or the same
    // set of the next piece.
    Rows target(const MatrixScan& p, const Sequence& q, int64_t set, int64_t piece,
                bool next_set) const {
      if (!x.data) return {};
      if (!apart()) return steps_of(p, x, q, set);
      const int64_t step = sets * columns;
      Rows rows = steps_of(
          p, {sums.get() + piece * size(p), DType::f32, {p.length * step, step, columns, 1}}, q,
          set);
      if (!next_set) rows.head = pieces / (p.heads / sets) * size(p);
      return rows;
    }
    void add(const MatrixScan& p) const {
      if (!apart()) return;
      constexpr int64_t kRows = 64;
      for_tasks(size(p) * pieces, p.batch * sets * ceil_div(p.length, kRows), [&](int64_t i) {
        const int64_t blocks = ceil_div(p.length, kRows), set = i / blocks % sets;
        const int64_t b = i / blocks / sets, t = i % blocks * kRows;
        MatrixSumJob job = {};
        job.parts = sums.get() + ((b * p.length + t) * sets + set) * columns;
        job.pieces = pieces;
        job.piece = size(p);
        job.row = sets * columns;
        job.rows = std::min(kRows, p.length - t);
        job.columns = columns;
        job.out = {moved(x, b * x.stride[0] + t * x.stride[1] + set * x.stride[2]), x.dtype, 0,
                   x.stride[1], x.stride[3]};
        kernels().matrix_sum(job);
      });
    }
  };
  const PartSums dq(p, g.dq, p.groups, p.keys, per_group * parts);
  const PartSums dk(p, g.dk, p.groups, p.keys, per_group * parts);
  const PartSums da(p, g.da, p.heads, p.keys, parts);
  const PartSums dw(p, g.dw, p.heads, 1, parts);
  // dd of each sequence, [sequence][h][p].
  const int64_t skips = g.dd.data ? p.heads * p.values : 0;
  Scratch<float> dd(p.sequences() * skips);
  std::fill_n(dd.get(), p.sequences() * skips, 0.0f);

  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    const Sequence q = sequence(p, share.sequence);
    Scratch<float> scratch(matrix_steps_scratch(share.heads, p.keys, share.columns, true));
    MatrixBackwardJob job = {};
    job.scan = job_of(p, share, g.stored, scratch.get());
    job.d_out = steps_of(p, g.d_out, q, share.head, share.first);
    job.d_last = states_of(g.d_last, share);
    const int64_t group = share.head / per_group;
    const int64_t piece = share.head % per_group * parts + share.part;
    job.dq = dq.target(p, q, group, piece, per_group == 1);
    job.dk = dk.target(p, q, group, piece, per_group == 1);
    job.dv = steps_of(p, g.dv, q, share.head, share.first);
    job.da = da.target(p, q, share.head, share.part, true);
    job.dw = dw.target(p, q, share.head, share.part, true);
    job.dinitial = states_of(g.dinitial, share);
    if (skips)
      job.dd = {dd.get() + share.sequence * skips + share.head * p.values + share.first, DType::f32,
                p.values, 0, 1};
    kernels().matrix_steps_backward(job, p.values);
  });

  for (const PartSums* parts : {&dq, &dk, &da, &dw}) parts->add(p);
  for (int64_t i = 0; i < skips; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < p.sequences(); ++s) sum += dd.get()[s * skips + i];
    static_cast<float*>(g.dd.data)[i / p.values * g.dd.stride[0] + i % p.values * g.dd.stride[1]] =
        sum;
  }
}

}  // namespace pentad::scan
