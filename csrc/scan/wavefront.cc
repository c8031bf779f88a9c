// SPDX-License-Identifier: Apache-2.0
// Cuts the recurrence along both axes into jobs: some channels of one batch row. As in cross_scan.cc
// pieces of sums depend on the shapes alone, and are added in order.
#include <algorithm>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/operands.h"
#include "scan/scan2d.h"
#include "scan/scan2d_kernels.h"
#include "scan/scan_drive.h"

namespace pentad::scan {
namespace {

constexpr int64_t kShare = 64;         // channels of a backward job
constexpr int64_t kSequenceParts = 8;  // most pieces of the batch in the backward pass

// Bl, Bt and C as floats, [b][three][place][n].
struct Coefficients {
  int64_t size;
  Scratch<float> data;

  explicit Coefficients(const Wavefront& p)
      : size(p.length() * p.states), data(3 * p.batch * size) {
    for_tasks(3 * p.batch * size, 3 * p.batch, [&](int64_t i) {
      const int64_t b = i / 3, which = i % 3;
      const Strided from = which < 2 ? image_of(p.b, b, which, 0) : image_of(p.c, b, 0);
      kernels().pack_rows({from, data.get() + i * size, nullptr, p.states, p.length(), p.states});
    });
  }
  const float* of(int64_t b, int64_t which) const { return data.get() + (3 * b + which) * size; }
};

WavefrontJob job_of(const Wavefront& p, const Coefficients& coefficients, int64_t b,
                    int64_t channel, int64_t channels, const float* stored, float* scratch) {
  WavefrontJob job = {};
  job.channels = channels;
  job.height = p.height;
  job.width = p.width;
  job.states = p.states;
  job.u = image_of(p.u, b, channel);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t* a = p.a.stride;
    job.delta[axis] = image_of(p.delta, b, axis, channel);
    job.a[axis] = {moved(p.a, axis * a[0] + channel * a[1]), p.a.dtype, a[1], a[2], 1, 0};
    job.b[axis] = coefficients.of(b, axis);
  }
  job.c = coefficients.of(b, 2);
  job.d = static_cast<const float*>(moved(p.d, channel * p.d.stride[0]));
  job.d_step = p.d.stride[0];
  job.stored = const_cast<float*>(stored);
  if (stored) job.stored += b * stored_bands(p.height) * p.width * p.states * p.dim + channel;
  job.all_channels = p.dim;
  job.scratch = scratch;
  return job;
}

int64_t state_steps(const Wavefront& p) { return p.batch * p.dim * p.length() * p.states; }

}  // namespace

void wavefront_forward(const Wavefront& p, const Operand& out, float* stored) {
  if (p.u.dtype == DType::f64) return reference_wavefront_forward(p, out);
  if (!p.batch || !p.dim || !p.length()) return;
  const Coefficients coefficients(p);
  const int64_t size = kernels().lanes, cuts = ceil_div(p.dim, size);
  for_tasks(state_steps(p), p.batch * cuts, [&](int64_t i) {
    const int64_t b = i / cuts, channel = i % cuts * size;
    Scratch<float> scratch(wavefront_scratch(p.width, p.states, false));
    WavefrontForwardJob job = {};
    job.scan =
        job_of(p, coefficients, b, channel, std::min(size, p.dim - channel), stored, scratch.get());
    job.out = image_of(out, b, channel);
    kernels().wavefront_forward(job);
  });
}

void wavefront_backward(const Wavefront& p, const WavefrontGradients& g) {
  if (p.u.dtype == DType::f64) return reference_wavefront_backward(p, g);
  const int64_t lanes = kernels().lanes, states = p.states, places = p.length();
  const bool any = p.batch && p.dim && places;
  const int64_t cuts = any ? ceil_div(p.dim, kShare) : 0;
  const int64_t pieces = any ? std::min(p.batch, kSequenceParts) : 0;
  const Coefficients coefficients(p);

  // dB and dC of each share of channels, [share][b][place][dBl n, dBt n, dC n, rest].
  const int64_t row_step = wavefront_row_step(states), rows = p.batch * places * row_step;
  Scratch<float> parts(cuts * rows);
  // What is summed over places, [piece][share][block of lanes][dAl n, dAt n, dD][lane].
  const int64_t of_block = 2 * states + 1, of_share = padded_channels(kShare, lanes) * of_block;
  Scratch<float> sums(pieces * cuts * of_share);
  std::fill_n(sums.get(), pieces * cuts * of_share, 0.0f);

  for_tasks(state_steps(p), pieces * cuts, [&](int64_t i) {
    const int64_t which = i / cuts, share = i % cuts;
    const int64_t channel = share * kShare, channels = std::min(kShare, p.dim - channel);
    Scratch<float> scratch(wavefront_scratch(p.width, states, true));
    for (int64_t b = p.batch * which / pieces; b < p.batch * (which + 1) / pieces; ++b) {
      WavefrontBackwardJob job = {};
      job.scan = job_of(p, coefficients, b, channel, channels, g.stored, scratch.get());
      job.d_out = image_of(g.d_out, b, channel);
      job.du = image_of(g.du, b, channel);
      for (int axis = 0; axis < 2; ++axis) job.ddelta[axis] = image_of(g.ddelta, b, axis, channel);
      job.rows = parts.get() + share * rows + b * places * row_step;
      job.row_step = row_step;
      job.sums = sums.get() + i * of_share;
      std::fill_n(job.rows, places * row_step, 0.0f);
      kernels().wavefront_backward(job);
    }
  });

  for (int64_t channel = 0; channel < p.dim; ++channel) {  // the pieces in order
    const int64_t share = channel / kShare, c = channel % kShare;
    const auto total = [&](int64_t vector) {
      float sum = 0.0f;
      for (int64_t piece = 0; piece < pieces; ++piece)
        sum += sums.get()[(piece * cuts + share) * of_share +
                          (c / lanes * of_block + vector) * lanes + c % lanes];
      return sum;
    };
    const int64_t* a = g.da.stride;
    if (g.da.data)
      for (int64_t n = 0; n < 2 * states; ++n)
        static_cast<float*>(g.da.data)[n / states * a[0] + channel * a[1] + n % states * a[2]] =
            total(n);
    if (g.dd.data) static_cast<float*>(g.dd.data)[channel * g.dd.stride[0]] = total(2 * states);
  }
  if (!g.db.data && !g.dc.data) return;
  const int64_t chunks = ceil_div(places, kChunk);
  for_tasks(rows * std::max<int64_t>(cuts, 1), p.batch * chunks, [&](int64_t i) {
    const int64_t b = i / chunks, first = i % chunks * kChunk;
    for (int64_t place = first; place < std::min(first + kChunk, places); ++place)
      for (int64_t k = 0; k < 3 * states; ++k) {
        const int64_t axis = k / states, n = k % states;
        const Operand& x = axis < 2 ? g.db : g.dc;
        if (!x.data) continue;
        float sum = 0.0f;
        for (int64_t share = 0; share < cuts; ++share)
          sum += parts.get()[share * rows + (b * places + place) * row_step + k];
        const Strided to = axis < 2 ? image_of(x, b, axis, n) : image_of(x, b, n);
        static_cast<float*>(to.data)[place * to.time] = sum;
      }
  });
}

}  // namespace pentad::scan
