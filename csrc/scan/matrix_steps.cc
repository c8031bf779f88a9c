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
#include "scan/matrix_drive.h"
#include "scan/matrix_steps_kernels.h"

namespace pentad::scan {
namespace {

constexpr int64_t kStateBytes = 1 << 18;  // of the heads of a job, in L2
constexpr int64_t kFewTasks = 4;          // sequences and heads below which columns are cut too
constexpr int64_t kLeastColumns = 32;  // of a backward job: what keys alone cost is a quarter of it

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

MatrixJob job_of(const MatrixScan& p, const Share& share, const float* stored, float* scratch) {
  MatrixJob job = matrix_job(p, share.sequence, share.head, share.heads, share.first, share.columns,
                             stored, scratch);
  const Sequence q = sequence(p, share.sequence, kMatrixChunk);
  job.q = group_steps(p, p.q, q, share);
  job.k = group_steps(p, p.k, q, share);
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
    job.out = steps_of(p, out, sequence(p, share.sequence, kMatrixChunk), share.head, share.first);
    job.last = states_of(last, share.sequence, share.head, share.first);
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

  const StepSums dq(p, g.dq, p.groups, p.keys, per_group * parts);
  const StepSums dk(p, g.dk, p.groups, p.keys, per_group * parts);
  const StepSums da(p, g.da, p.heads, p.keys, parts);
  const StepSums dw(p, g.dw, p.heads, 1, parts);
  const SkipSums dd(p, g.dd);

  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    const Sequence q = sequence(p, share.sequence, kMatrixChunk);
    Scratch<float> scratch(matrix_steps_scratch(share.heads, p.keys, share.columns, true));
    MatrixBackwardJob job = {};
    job.scan = job_of(p, share, g.stored, scratch.get());
    job.d_out = steps_of(p, g.d_out, q, share.head, share.first);
    job.d_last = states_of(g.d_last, share.sequence, share.head, share.first);
    const int64_t group = share.head / per_group;
    const int64_t piece = share.head % per_group * parts + share.part;
    const int64_t next_piece = per_group == 1 ? 0 : parts;
    job.dq = dq.target(q, group, piece, next_piece);
    job.dk = dk.target(q, group, piece, next_piece);
    job.dv = steps_of(p, g.dv, q, share.head, share.first);
    job.da = da.target(q, share.head, share.part);
    job.dw = dw.target(q, share.head, share.part);
    job.dinitial = states_of(g.dinitial, share.sequence, share.head, share.first);
    job.dd = dd.target(share.sequence, share.head, share.first);
    kernels().matrix_steps_backward(job, p.values);
  });

  for (const StepSums* sums : {&dq, &dk, &da, &dw}) sums->add();
  dd.add();
}

}  // namespace pentad::scan
