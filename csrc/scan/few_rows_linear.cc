// SPDX-License-Identifier: Apache-2.0
// The projections of a step: rows of the weight cut into pieces.
#include "scan/few_rows_linear_kernels.h"

#include <algorithm>

#include "common/ceil_div.h"
#include "common/scratch.h"
#include "scan/operands.h"
#include "scan/scan.h"
#include "scan/scan_drive.h"

namespace pentad::scan {
namespace {

constexpr int64_t kPieceBytes = 1 << 18;  // of the weight, about

}  // namespace

void few_rows_linear(const FewRowsLinear& p, const Operand& out) {
  if (p.x.dtype == DType::f64) return reference_few_rows_linear(p, out);
  const int64_t step = padded_channels(p.inputs, kMaxLanes);
  // As they lie, or as floats.
  const float* x = static_cast<const float*>(p.x.data);
  int64_t x_step = p.x.stride[0];
  Scratch<float> floats;
  if (p.x.dtype != DType::f32 || p.x.stride[1] != 1 || step != p.inputs) {
    floats = Scratch<float>(p.rows * step);
    kernels().few_rows_inputs(
        {p.rows, p.inputs, step, strided(p.x, 0, p.x.stride[0], p.x.stride[1]), floats.get()});
    x = floats.get(), x_step = step;
  }
  const int64_t row_bytes = std::max<int64_t>(1, p.inputs * size_of(p.weight.dtype));
  const int64_t piece = std::max<int64_t>(8, kPieceBytes / row_bytes / 8 * 8);
  // A product is a quarter of what for_tasks counts as an operation.
  for_tasks(p.rows * p.outputs * p.inputs / 4, ceil_div(p.outputs, piece), [&](int64_t task) {
    const int64_t first = task * piece;
    FewRowsJob job{};
    job.rows = p.rows, job.inputs = p.inputs, job.step = x_step;
    job.outputs = std::min(piece, p.outputs - first);
    job.x = x;
    job.weight = strided(p.weight, first * p.weight.stride[0], p.weight.stride[0], 1);
    job.bias = strided(p.bias, first * p.bias.stride[0], p.bias.stride[0]);
    job.out = strided(out, first * out.stride[1], out.stride[0], out.stride[1]);
    kernels().few_rows_linear(job);
  });
}

}  // namespace pentad::scan
