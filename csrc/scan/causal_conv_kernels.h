// SPDX-License-Identifier: Apache-2.0
// What the kernels of the causal convolution are given; scan_kernels.h holds their table. A span is
// a piece of one sequence's time for a block of channels.
#pragma once
#include <stdint.h>

#include "scan/scan_kernels.h"

namespace pentad::scan {

constexpr int kMaxConvWidth = 64;
constexpr int kMaxConvChannels = 512;  // of a span

// Taps: [vector of channels][width + 1][lane] floats: the weights, then the bias; zeros in lanes
// past the last channel.
struct ConvTapsJob {
  Strided weight;  // (channel, k)
  Strided bias;    // (channel); or absent
  int64_t channels, width;
  float* taps;
};

struct ConvSpan {
  int64_t channels, width;
  int64_t first, count;  // steps of the sequence
  const float* taps;
  // Of step `first` on: bit k says that tap k counts; without the last bit the step is padding.
  // Null: all count (and lie in x, or in `initial`).
  const uint64_t* masks;
  bool silu;
  Strided x;        // (channel, t): the block's first channel, the sequence's first step
  Strided initial;  // (channel, k), or absent
};

struct ConvForwardJob {
  ConvSpan span;
  Strided out;  // (channel, t)
};

// `masks` reach width - 1 steps further here, up to the sequence's end; without masks the sequence
// has those steps.
struct ConvBackwardJob {
  ConvSpan span;
  int64_t length;  // of the sequence
  Strided d_out, d_final;
  Strided dx, dinitial;  // each may be absent
  float* sums;           // as taps: the gradients of weights and bias, added to
};

// One sequence's further steps on its cache.
struct ConvUpdateJob {
  int64_t channels, width, length, state_length;
  int64_t position;  // in a ring; -1: the newest input is last
  const float* taps;
  bool silu;
  Strided x, state, out;
};

}  // namespace pentad::scan
