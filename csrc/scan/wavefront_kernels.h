// SPDX-License-Identifier: Apache-2.0
// The recurrence along both axes of an image; wavefront.cc drives it.
#pragma once
#include "scan/scan_kernels.h"

namespace pentad::scan {

// Rows between stored ones. The backward pass computes a band again and holds its states.
constexpr int64_t kBand = 8;

// Some channels of one batch row.
struct WavefrontJob {
  int64_t channels, height, width, states;
  Strided u, delta[2];    // (channel, place); left, top
  States a[2];            // (d, n)
  const float *b[2], *c;  // [place][n]
  const float* d;         // may be null
  int64_t d_step;
  float* stored;  // [band][j][n][all channels], or null
  int64_t all_channels;
  float* scratch;
};

struct WavefrontForwardJob {
  WavefrontJob scan;
  Strided out;
};

// rows [place][row_step] += sums over the channels: dBl [n], dBt [n], dC [n], whole eights of them.
// sums [block of lanes][2 n + 1][lane] += dAl, dAt, dD.
struct WavefrontBackwardJob {
  WavefrontJob scan;
  Strided d_out, du, ddelta[2];
  float *rows, *sums;
  int64_t row_step;
};
static constexpr int64_t wavefront_row_step(int64_t states) { return (3 * states + 7) / 8 * 8; }

// Floats of scratch.
static constexpr int64_t wavefront_scratch(int64_t width, int64_t states, bool backward) {
  const int64_t row = width * states * kMaxLanes;
  return (backward ? (kBand + 2) * row + wavefront_row_step(states) * kMaxLanes : row) +
         5 * states * kMaxLanes;
}

}  // namespace pentad::scan
