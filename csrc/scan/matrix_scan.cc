// SPDX-License-Identifier: Apache-2.0
// Cuts recurrences of matrix states into jobs: a sequence, and some heads that share the products
// of their queries and keys, or some that have their own. Every head's states are its own, so the
// forward pass may be cut anywhere. The backward pass sums over heads (dq, dk) and over sequences
// (dd): its pieces depend on the shapes alone, and are added in order.
#include "scan/matrix_scan.h"

#include <algorithm>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/matrix_drive.h"
#include "scan/matrix_steps.h"

namespace pentad::scan {
namespace {

constexpr int64_t kStateBytes = 256 << 10;  // of a job's heads, in L2
// Heads of a group in a backward job: those share one third as much work as one has of its own.
constexpr int64_t kHeads = 6;

// Heads [first, first + count) of a sequence, of one group or each of its own.
struct Share {
  int64_t sequence, group, first, count, shared, piece;  // piece: of the group
};
class Shares {
 public:
  Shares(const MatrixScan& p, int64_t most) : p_(p), alone_(p.groups == p.heads) {
    runs_ = alone_ ? 1 : p.groups;
    cuts_ = ceil_div(p.heads / runs_, most);
  }
  int64_t count() const { return p_.sequences() * runs_ * cuts_; }
  int64_t pieces() const { return alone_ ? 1 : cuts_; }  // of one group
  Share operator[](int64_t i) const {
    const int64_t cut = i % cuts_, run = i / cuts_ % runs_, heads = p_.heads / runs_;
    const int64_t first = heads * cut / cuts_, count = heads * (cut + 1) / cuts_ - first;
    const int64_t sequence = i / cuts_ / runs_;
    if (alone_) return {sequence, first, first, count, 1, 0};
    return {sequence, run, run * heads + first, count, count, cut};
  }

 private:
  const MatrixScan& p_;
  bool alone_;
  int64_t runs_, cuts_;
};

// Heads that go together, as their rows lie side by side and their states fit into L2, but enough
// jobs for the threads. No bit depends on it where no sum is cut.
int64_t most_heads(const MatrixScan& p) {
  const int64_t fit = kStateBytes / (p.keys * p.values * int64_t{sizeof(float)});
  int64_t most = std::max<int64_t>(std::min(p.heads, fit), 1);
  while (most > 1 && Shares(p, most).count() < 3 * num_threads()) most = ceil_div(most, 2);
  return most;
}

MatrixJob job_of(const MatrixScan& p, const Share& share, const float* stored, float* scratch) {
  MatrixJob job =
      matrix_job(p, share.sequence, share.first, share.count, 0, p.values, stored, scratch);
  const Sequence q = sequence(p, share.sequence, kMatrixChunk);
  job.shared = share.shared;
  job.q = steps_of(p, p.q, q, share.group);
  job.k = steps_of(p, p.k, q, share.group);
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
  if (p.heads == 0) return;
  const Shares shares(p, most_heads(p));
  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    const Sequence q = sequence(p, share.sequence, kMatrixChunk);
    Scratch<float> scratch(matrix_scratch(share.count, p.keys, p.values, false));
    MatrixForwardJob job = {};
    job.scan = job_of(p, share, stored, scratch.get());
    job.out = steps_of(p, out, q, share.first);
    job.last = states_of(last, share.sequence, share.first);
    kernels().matrix_forward(job);
  });
}

void matrix_scan_backward(const MatrixScan& p, const MatrixScanGradients& g) {
  if (p.v.dtype == DType::f64 || p.heads == 0) return reference_matrix_scan_backward(p, g);
  if (p.key_decay) return matrix_steps_backward(p, g);
  const Shares shares(p, p.groups == p.heads ? most_heads(p) : kHeads);
  const StepSums dq(p, g.dq, p.groups, p.keys, shares.pieces());
  const StepSums dk(p, g.dk, p.groups, p.keys, shares.pieces());
  const SkipSums dd(p, g.dd);
  for_tasks(multiply_adds(p), shares.count(), [&](int64_t i) {
    const Share share = shares[i];
    const Sequence q = sequence(p, share.sequence, kMatrixChunk);
    Scratch<float> scratch(matrix_scratch(share.count, p.keys, p.values, true));
    MatrixBackwardJob job = {};
    job.scan = job_of(p, share, g.stored, scratch.get());
    job.d_out = steps_of(p, g.d_out, q, share.first);
    job.d_last = states_of(g.d_last, share.sequence, share.first);
    job.dq = dq.target(q, share.group, share.piece);
    job.dk = dk.target(q, share.group, share.piece);
    job.dv = steps_of(p, g.dv, q, share.first);
    job.da = steps_of(p, g.da, q, share.first);
    job.dw = steps_of(p, g.dw, q, share.first);
    job.dinitial = states_of(g.dinitial, share.sequence, share.first);
    job.dd = dd.target(share.sequence, share.first);
    kernels().matrix_backward(job);
  });
  for (const StepSums* sums : {&dq, &dk}) sums->add();
  dd.add();
}

}  // namespace pentad::scan
