// SPDX-License-Identifier: Apache-2.0
// Cuts the scans of an image into jobs: some channels of one batch row, all directions one after
// another. The image lies in scratch as rows of channels, by place. The kernels of the selective
// scan visit its rows in the order of a direction, and add what they give into rows by place. delta
// goes into rows in scan order, unless it lies in that order: then they read it where it is.
//
// (1, 192, 56, 56), ms, pairs alternated, delta by place and by step, and before that with rows
// copied into scan order and back: 1 state, one thread, forward 4.3 and 3.9 (4.8 and 4.5), training
// 15.3 and 13.7 (17.1 and 17.4); 16 states, two threads, forward 5.6 and 5.5 (6.8 and 6.8),
// training 22.8 and 21.2 (25.1 and 22.9). Of a forward pass with 16 states 70 % are the loop over
// states, which is the selective scan's. Not faster: lines of delta asked for four chunks ahead in
// pack_rows in place of one.
//
// Pieces of sums (dB, dC over channels; dA, dD over the batch) depend on the shapes alone.
#include <algorithm>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "scan/operands.h"
#include "scan/scan2d.h"
#include "scan/scan2d_kernels.h"
#include "scan/scan_drive.h"

namespace pentad::scan {
namespace {

// Channels of a job, whose rows should stay in the caches. (192, 56, 56), two threads, ms, with 16,
// 32 and 64 channels: 16 states, forward 5.7, 5.7, 5.4, training 26.5, 22.9, 25.7; 1 state, forward
// 2.4, 2.5, 2.7, training 9.0, 8.8, 10.6.
constexpr int64_t kMostChannels = 32;  // forward
constexpr int64_t kShare = 32;         // backward
constexpr int64_t kSequenceParts = 8;  // most pieces of the batch in the backward pass

// Direction by direction.
struct Orders {
  const CrossScan& p;
  Scratch<int32_t> inverse;  // [k][place]: the step

  explicit Orders(const CrossScan& problem)
      : p(problem), inverse(problem.directions * problem.length), steps_(problem.directions) {
    for (int64_t k = 0; k < p.directions; ++k) {
      const int32_t* to = places(k);
      bool up = true, down = true;
      for (int64_t t = 0; t < p.length; ++t) {
        inverse.get()[k * p.length + to[t]] = static_cast<int32_t>(t);
        up &= to[t] == t;
        down &= to[t] == p.length - 1 - t;
      }
      steps_[k] = !p.length ? 0 : up ? 1 : down ? -1 : 0;
    }
  }
  const int32_t* places(int64_t k) const { return p.order + k * p.length; }
  // 1 or -1 where the places follow each other, forwards or backwards; else 0.
  int64_t straight(int64_t k) const { return steps_[k]; }
  // Where element i of an array by place or by step lies in scan order; null: at i.
  const int32_t* steps(int64_t k, bool by_step) const {
    return by_step ? nullptr : inverse.get() + k * p.length;
  }

 private:
  std::vector<int> steps_;
};

// B and C as floats in scan order, [b][k][t][n].
struct Coefficients {
  int64_t states, length, directions;
  Scratch<float> b, c;

  explicit Coefficients(const Orders& orders)
      : states(orders.p.states), length(orders.p.length), directions(orders.p.directions) {
    const CrossScan& p = orders.p;
    const int64_t all = p.batch * directions;
    b = Scratch<float>(all * length * states);
    c = Scratch<float>(all * length * states);
    for_tasks(2 * all * length * states, 2 * all, [&](int64_t i) {
      const int64_t bk = i % all, k = bk % directions;
      const bool second = i >= all;
      const Strided from = image_of(second ? p.c : p.b, bk / directions, k, 0);
      kernels().pack_rows({from, at(second ? c : b, bk),
                           orders.steps(k, second ? p.c_by_step : p.b_by_step), states, length,
                           states});
    });
  }
  float* at(const Scratch<float>& x, int64_t bk) const { return x.get() + bk * length * states; }
  States steps(const Scratch<float>& x, int64_t bk) const {
    return {at(x, bk), DType::f32, 0, 1, 1, states};
  }
};

// Some channels of one batch row, and their rows in scan order.
struct Piece {
  const CrossScan& p;
  const Orders& orders;
  int64_t b, channel, channels, stride;

  RowsJob rows(const Strided& x, float* rows, const int32_t* index) const {
    return {x, rows, index, channels, p.length, stride};
  }
  Strided scan_order(float* rows) const { return {rows, DType::f32, 1, stride}; }
  // Rows by place, as direction k visits them.
  Strided visited(float* image, int64_t k, bool add = false) const {
    return {image, DType::f32, 1, stride, orders.places(k), add};
  }
  // An array by place or by step in scan order, if its elements are a step apart there; else none.
  Strided direct(const Operand& x, int64_t k, bool by_step) const {
    Strided found = image_of(x, b, k, channel);
    const int64_t step = by_step ? 1 : orders.straight(k);
    if (!step) return {};
    if (step < 0) found = image_of(x, b, k, channel, p.length - 1), found.time = -found.time;
    return found;
  }

  SelectiveJob scan(int64_t k, const Strided& u, const Strided& delta,
                    const Coefficients& coefficients, const float* stored, float* scratch) const {
    SelectiveJob job = {};
    job.channels = channels;
    job.steps = p.length;
    job.states = p.states;
    job.softplus = p.softplus;
    job.u = u;
    job.delta = delta;
    const int64_t* a = p.a.stride;
    job.a = {moved(p.a, k * a[0] + channel * a[1]), p.a.dtype, a[1], a[2], 1, 0};
    const int64_t bk = b * p.directions + k;
    job.b = coefficients.steps(coefficients.b, bk);
    job.c = coefficients.steps(coefficients.c, bk);
    const int64_t *d = p.d.stride, *bias = p.delta_bias.stride;
    job.d = static_cast<const float*>(moved(p.d, k * d[0] + channel * d[1]));
    job.d_step = d[1];
    job.bias = static_cast<const float*>(moved(p.delta_bias, k * bias[0] + channel * bias[1]));
    job.bias_step = bias[1];
    job.stored = const_cast<float*>(stored);
    if (stored) job.stored += bk * ceil_div(p.length, kChunk) * p.states * p.dim + channel;
    job.all_channels = p.dim;
    job.scratch = scratch;
    return job;
  }
};

int64_t state_steps(const CrossScan& p) {
  return p.batch * p.directions * p.dim * p.length * p.states;
}

}  // namespace

void cross_scan_forward(const CrossScan& p, const Operand& out, float* stored) {
  if (p.u.dtype == DType::f64) return reference_cross_scan_forward(p, out);
  if (!p.batch || !p.dim || !p.length) return;
  const Orders orders(p);
  const Coefficients coefficients(orders);
  const int64_t lanes = kernels().lanes;
  int64_t size = kMostChannels;
  while (size > lanes && p.batch * ceil_div(p.dim, size) < 3 * num_threads()) size /= 2;
  const int64_t cuts = ceil_div(p.dim, size), stride = padded_channels(size, lanes);
  const int64_t rows = p.length * stride;
  for_tasks(state_steps(p), p.batch * cuts, [&](int64_t i) {
    const int64_t channel = i % cuts * size, channels = std::min(size, p.dim - channel);
    const Piece piece = {p, orders, i / cuts, channel, channels, stride};
    Scratch<float> scratch(selective_scratch(channels, p.states)), images(3 * rows);
    float *u = images.get(), *sum = u + rows, *packed = sum + rows;
    const Kernels& run = kernels();
    run.pack_rows(piece.rows(image_of(p.u, piece.b, channel), u, nullptr));
    for (int64_t k = 0; k < p.directions; ++k) {
      Strided delta = piece.direct(p.delta, k, p.delta_by_step);
      if (!delta.data) {
        delta = piece.scan_order(packed);
        run.pack_rows(piece.rows(image_of(p.delta, piece.b, k, channel), packed,
                                 orders.steps(k, p.delta_by_step)));
      }
      SelectiveForwardJob job = {};
      job.scan = piece.scan(k, piece.visited(u, k), delta, coefficients, stored, scratch.get());
      job.out = piece.visited(sum, k, k > 0);
      run.selective_forward(job);
    }
    if (!p.directions) std::fill_n(sum, rows, 0.0f);
    run.unpack_rows(piece.rows(image_of(out, piece.b, channel), sum, nullptr));
  });
}

void cross_scan_backward(const CrossScan& p, const CrossScanGradients& g) {
  if (p.u.dtype == DType::f64) return reference_cross_scan_backward(p, g);
  const Orders orders(p);
  const Coefficients coefficients(orders);
  const int64_t lanes = kernels().lanes, states = p.states;
  const int64_t cuts = ceil_div(p.dim, kShare), pieces = std::min(p.batch, kSequenceParts);
  const int64_t stride = padded_channels(std::min(kShare, p.dim), lanes);
  const int64_t image = p.length * stride;

  // dB and dC of each share of channels, in scan order: [share][b][k][t][n].
  const int64_t coefficient = p.length * states, all = p.batch * p.directions * coefficient;
  Scratch<float> db(g.db.data ? cuts * all : 0), dc(g.dc.data ? cuts * all : 0);
  const auto part = [&](const Operand& x, const Scratch<float>& parts, int64_t share,
                        int64_t bk) -> States {
    if (!x.data) return {};
    return {parts.get() + share * all + bk * coefficient, DType::f32, 0, 1, 1, states};
  };
  // What is summed over time: [piece][share][k][block of lanes][SelectiveSums].
  const SelectiveSums layout = selective_sums(states, false, false);
  const int64_t sums_of_k = padded_channels(kShare, lanes) * layout.size;
  const int64_t sums_of_share = p.directions * sums_of_k;
  Scratch<float> sums(pieces * cuts * sums_of_share);
  std::fill_n(sums.get(), pieces * cuts * sums_of_share, 0.0f);

  for_tasks(state_steps(p), pieces * cuts, [&](int64_t i) {
    const int64_t which = i / cuts, share = i % cuts;
    const int64_t channel = share * kShare, channels = std::min(kShare, p.dim - channel);
    Scratch<float> scratch(selective_scratch(channels, states)), images(4 * image);
    float *u = images.get(), *d_out = u + image, *du = d_out + image, *packed = du + image;
    const Kernels& run = kernels();
    for (int64_t b = p.batch * which / pieces; b < p.batch * (which + 1) / pieces; ++b) {
      const Piece piece = {p, orders, b, channel, channels, stride};
      run.pack_rows(piece.rows(image_of(p.u, b, channel), u, nullptr));
      run.pack_rows(piece.rows(image_of(g.d_out, b, channel), d_out, nullptr));
      for (int64_t k = 0; k < p.directions; ++k) {
        const int32_t* steps = orders.steps(k, p.delta_by_step);
        Strided delta = piece.direct(p.delta, k, p.delta_by_step);
        Strided ddelta = piece.direct(g.ddelta, k, p.delta_by_step);
        const bool apart = !delta.data;
        if (apart) {
          delta = ddelta = piece.scan_order(packed);  // a tile is read before it is written
          run.pack_rows(piece.rows(image_of(p.delta, b, k, channel), packed, steps));
        }
        SelectiveBackwardJob job = {};
        job.scan = piece.scan(k, piece.visited(u, k), delta, coefficients, g.stored, scratch.get());
        job.d_out = piece.visited(d_out, k);
        job.du = piece.visited(du, k, k > 0);
        job.ddelta = ddelta;
        job.db = part(g.db, db, share, b * p.directions + k);
        job.dc = part(g.dc, dc, share, b * p.directions + k);
        job.sums = sums.get() + i * sums_of_share + k * sums_of_k;
        run.selective_backward(job);
        if (apart && g.ddelta.data)
          run.unpack_rows(piece.rows(image_of(g.ddelta, b, k, channel), packed, steps));
      }
      if (!p.directions) std::fill_n(du, image, 0.0f);
      if (g.du.data) run.unpack_rows(piece.rows(image_of(g.du, b, channel), du, nullptr));
    }
  });

  // The pieces in order.
  for_tasks(pieces * cuts * sums_of_share, p.directions * cuts, [&](int64_t i) {
    const int64_t k = i / cuts, share = i % cuts, first = share * kShare;
    for (int64_t channel = first; channel < std::min(first + kShare, p.dim); ++channel) {
      const auto total = [&](int64_t vector) {
        const int64_t c = channel - first;
        const int64_t at = k * sums_of_k + (c / lanes * layout.size + vector) * lanes + c % lanes;
        float sum = 0.0f;
        for (int64_t piece = 0; piece < pieces; ++piece)
          sum += sums.get()[(piece * cuts + share) * sums_of_share + at];
        return sum;
      };
      const auto write = [&](const Operand& x, int64_t offset, float value) {
        static_cast<float*>(x.data)[k * x.stride[0] + channel * x.stride[1] + offset] = value;
      };
      if (g.da.data)
        for (int64_t n = 0; n < states; ++n) write(g.da, n * g.da.stride[2], total(n));
      if (g.dd.data) write(g.dd, 0, total(layout.dd));
      if (g.ddelta_bias.data) write(g.ddelta_bias, 0, total(layout.dbias));
    }
  });
  const auto add_shares = [&](const Operand& x, bool by_step, const float* parts) {
    if (!x.data) return;
    const int64_t chunks = ceil_div(p.length, kChunk);
    for_tasks(all * cuts, p.batch * p.directions * chunks, [&](int64_t i) {
      const int64_t bk = i / chunks, k = bk % p.directions, begin = i % chunks * kChunk;
      const int64_t* to = x.stride;
      float* out = static_cast<float*>(x.data) + bk / p.directions * to[0] + k * to[1];
      for (int64_t t = begin; t < std::min(begin + kChunk, p.length); ++t) {
        const int64_t place = by_step ? t : orders.places(k)[t];
        for (int64_t n = 0; n < states; ++n) {
          float sum = 0.0f;
          for (int64_t share = 0; share < cuts; ++share)
            sum += parts[share * all + bk * coefficient + t * states + n];
          out[n * to[2] + place * to[3]] = sum;
        }
      }
    });
  };
  add_shares(g.db, p.b_by_step, db.get());
  add_shares(g.dc, p.c_by_step, dc.get());
}

}  // namespace pentad::scan
