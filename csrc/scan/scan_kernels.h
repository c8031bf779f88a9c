// SPDX-License-Identifier: Apache-2.0
// The inner kernels that exist once per instruction-set level (*_simd.inc), as plain structs and
// function pointers. The drivers, one per subject, fill the structs and call them.
#pragma once
#include <stdint.h>

#include "common/tensor_view.h"

namespace pentad::scan {

// Element (channel, t) of an array at data + channel * `channel` + t * `time`; null: absent. Time
// runs in the order of the recurrence: a reversed sequence has its last element at `data`.
//
// With `places` it is that of step places[t]: of floats, next to each other in whole vectors of
// channels. `add`: what is written there is added.
struct Strided {
  void* data;
  DType dtype;
  int64_t channel, time;
  const int32_t* places = nullptr;
  bool add = false;
};

// (d, n, part) of floats, or with time (n, t, part) of any dtype.
struct States {
  void* data;  // null: absent
  DType dtype;
  int64_t channel, state, part, time;
};

// Steps between stored states. The backward pass recomputes what lies between, so 1/32 of the
// states' memory is kept.
constexpr int64_t kChunk = 32;
constexpr int kMaxLanes = 16;  // of any level

// One sequence of some channels of one group: the whole walk over time. Scan order throughout.
struct SelectiveJob {
  int64_t channels, steps, states;
  bool complex, softplus;
  bool constant_b, constant_c;  // b, c are (d, n, part); else (n, t, part)
  Strided u, delta, z;
  States a, b, c;
  const float* d;  // may be null
  const float* bias;
  int64_t d_step, bias_step;
  States initial;  // may be absent
  float* stored;   // of the first chunk: [chunk][n][part][all channels], or null
  int64_t all_channels;
  float* scratch;
};

struct SelectiveForwardJob {
  SelectiveJob scan;
  Strided out;
  States last;  // may be absent
};

// db, dc (n, t, part), f32, are overwritten; they are absent where constant or not wanted. What is
// summed over time is added to `sums`, per block of lanes: see SelectiveSums.
struct SelectiveBackwardJob {
  SelectiveJob scan;
  Strided d_out, du, ddelta, dz;
  States d_last, db, dc, dinitial;
  float* sums;
};

// Offsets, in vectors, of the sums of one block of channels: dA, constant dB and dC [n][part], dD,
// ddelta_bias.
struct SelectiveSums {
  int64_t db, dc, dd, dbias, size;
};
static constexpr SelectiveSums selective_sums(int64_t states, bool constant_b, bool constant_c) {
  const int64_t db = states, dc = db + (constant_b ? states : 0);  // `states` times parts
  const int64_t dd = dc + (constant_c ? states : 0);
  return {db, dc, dd, dd + 1, dd + 2};
}

// Floats of scratch that a job needs; `states` times parts.
static constexpr int64_t selective_scratch(int64_t channels, int64_t states) {
  return (channels + kMaxLanes) * states * 5 + kChunk * (4 * states + 8 * (states / 4 + 3)) + 64;
}

// causal_conv_kernels.h, state_update_kernels.h, few_rows_linear_kernels.h
struct ConvTapsJob;
struct ConvForwardJob;
struct ConvBackwardJob;
struct ConvUpdateJob;
struct StateUpdateJob;
struct FewRowsJob;
struct FewRowsInputs;
// matrix_scan_kernels.h
struct MatrixForwardJob;
struct MatrixBackwardJob;
struct MatrixSumJob;
struct MatrixUpdateJob;  // matrix_update_kernels.h
// scan2d_kernels.h
struct RowsJob;
// wavefront_kernels.h
struct WavefrontForwardJob;
struct WavefrontBackwardJob;

// Real and imaginary part; the second is unused where numbers are real.
struct Parts {
  Strided part[2];
};

// Some channels' recurrence over all of time. h0 has no time.
struct RecurrenceJob {
  int64_t channels, steps;
  bool complex, log_space;
  Parts a, x, h, h0;
  float* carry;  // scratch: 2 * (channels + kMaxLanes) * parts floats
};
struct RecurrenceBackwardJob {
  RecurrenceJob recurrence;  // x is not read
  Parts dh, dx, da, dh0;     // all but dh may be absent
  bool sum_da;               // da has no time
};

struct Kernels {
  int lanes;  // floats per vector
  void (*conv_taps)(const ConvTapsJob&);
  void (*conv_forward)(const ConvForwardJob&);
  void (*conv_backward)(const ConvBackwardJob&);
  void (*conv_update)(const ConvUpdateJob&);
  void (*state_update)(const StateUpdateJob&);
  void (*few_rows_inputs)(const FewRowsInputs&);
  void (*few_rows_linear)(const FewRowsJob&);
  void (*selective_forward)(const SelectiveForwardJob&);
  void (*selective_backward)(const SelectiveBackwardJob&);
  void (*recurrence_forward)(const RecurrenceJob&);
  void (*recurrence_backward)(const RecurrenceBackwardJob&);
  void (*matrix_forward)(const MatrixForwardJob&);
  void (*matrix_backward)(const MatrixBackwardJob&);
  void (*matrix_sum)(const MatrixSumJob&);
  void (*matrix_steps_forward)(const MatrixForwardJob&, int64_t stored_row);
  void (*matrix_steps_backward)(const MatrixBackwardJob&, int64_t stored_row);
  void (*matrix_update)(const MatrixUpdateJob&);
  void (*pack_rows)(const RowsJob&);
  void (*unpack_rows)(const RowsJob&);
  void (*wavefront_forward)(const WavefrontForwardJob&);
  void (*wavefront_backward)(const WavefrontBackwardJob&);
};

const Kernels& kernels();  // of the level in use

}  // namespace pentad::scan

// One table per level that is compiled in.
namespace pentad::v2 {
extern const scan::Kernels scan_kernels;
}
namespace pentad::v3 {
extern const scan::Kernels scan_kernels;
}
namespace pentad::v4 {
extern const scan::Kernels scan_kernels;
}
namespace pentad::v4x {
extern const scan::Kernels scan_kernels;
}
namespace pentad::neon {
extern const scan::Kernels scan_kernels;
}
