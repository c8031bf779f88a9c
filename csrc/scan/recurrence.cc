// SPDX-License-Identifier: Apache-2.0
// Cuts the elementwise recurrence into jobs: some channels, all of time. Channels do not meet, so
// the cut changes no bit.
#include "scan/scan.h"
#include "scan/scan_drive.h"

#include <algorithm>

#include "common/ceil_div.h"
#include "common/scratch.h"

namespace pentad::scan {
namespace {

// How channels (o, i) become rows of jobs: one after another where every array allows it, else only
// within each o.
struct Channels {
  int64_t outer, inner;
};

bool joins(const Operand& x, int64_t inner) {
  return !x.data || x.stride[0] == inner * x.stride[1];
}

Parts parts_of(const Recurrence& p, const Operand& x, int64_t outer, int64_t inner, bool timed,
               int part_axis) {
  Parts parts = {};
  if (!x.data) return parts;
  constexpr int time_axis = 2;
  int64_t first = outer * x.stride[0] + inner * x.stride[1];
  if (timed && p.reverse) first += (p.length - 1) * x.stride[time_axis];
  for (int part = 0; part < p.parts(); ++part)
    parts.part[part] = {
        static_cast<char*>(x.data) + (first + part * x.stride[part_axis]) * size_of(x.dtype),
        x.dtype, x.stride[1], timed ? (p.reverse ? -x.stride[time_axis] : x.stride[time_axis]) : 0};
  return parts;
}

// Channels of a job. Where time is contiguous a job follows few rows to their end; else rows of
// memory hold channels, and many are wanted side by side.
int64_t job_channels(const Recurrence& p, const Operand& x) {
  const int64_t lanes = kernels().lanes;
  return x.stride[2] == p.parts() ? lanes : std::max<int64_t>(lanes, 128);
}

template <class Job>
void for_jobs(const Recurrence& p, const Operand& x, const Channels& channels, const Job& job) {
  const int64_t size = job_channels(p, x), cuts = ceil_div(channels.inner, size);
  for_tasks(p.outer * p.inner * p.length * p.parts(), channels.outer * cuts, [&](int64_t i) {
    const int64_t first = i % cuts * size;
    const int64_t count = std::min(size, channels.inner - first);
    // Carries, and sums of da.
    Scratch<float> carry(2 * (count + kMaxLanes) * p.parts());
    job(i / cuts, first, count, carry.get());
  });
}

RecurrenceJob job_of(const Recurrence& p, const Operand& h, int64_t outer, int64_t first,
                     int64_t count, float* carry) {
  RecurrenceJob job = {};
  job.channels = count;
  job.steps = p.length;
  job.complex = p.complex;
  job.log_space = p.log_space;
  job.a = parts_of(p, p.a, outer, first, true, 3);
  job.x = parts_of(p, p.x, outer, first, true, 3);
  job.h = parts_of(p, h, outer, first, true, 3);
  job.h0 = parts_of(p, p.h0, outer, first, false, 2);
  job.carry = carry;
  return job;
}

}  // namespace

void recurrence_forward(const Recurrence& p, const Operand& h) {
  if (p.x.dtype == DType::f64) return reference_recurrence_forward(p, h);
  Channels channels = {p.outer, p.inner};
  if (joins(p.a, p.inner) && joins(p.x, p.inner) && joins(h, p.inner) && joins(p.h0, p.inner))
    channels = {1, p.outer * p.inner};
  for_jobs(p, p.x, channels, [&](int64_t outer, int64_t first, int64_t count, float* carry) {
    kernels().recurrence_forward(job_of(p, h, outer, first, count, carry));
  });
}

void recurrence_backward(const Recurrence& p, const RecurrenceGradients& g) {
  if (p.a.dtype == DType::f64) return reference_recurrence_backward(p, g);
  Channels channels = {p.outer, p.inner};
  bool all = true;
  for (const Operand* x : {&p.a, &p.h0, &g.h, &g.dh, &g.da, &g.dx, &g.dh0})
    all = all && joins(*x, p.inner);
  if (all) channels = {1, p.outer * p.inner};
  for_jobs(p, g.dh, channels, [&](int64_t outer, int64_t first, int64_t count, float* carry) {
    RecurrenceBackwardJob job = {};
    job.recurrence = job_of(p, g.h, outer, first, count, carry);
    job.dh = parts_of(p, g.dh, outer, first, true, 3);
    job.dx = parts_of(p, g.dx, outer, first, true, 3);
    job.da = parts_of(p, g.da, outer, first, !g.sum_da, 3);
    job.dh0 = parts_of(p, g.dh0, outer, first, false, 2);
    job.sum_da = g.sum_da;
    kernels().recurrence_backward(job);
  });
}

}  // namespace pentad::scan
