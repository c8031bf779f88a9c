// SPDX-License-Identifier: Apache-2.0
// One token on a cache of matrix states: cut into runs of heads.
#include "scan/matrix_update_kernels.h"

#include <algorithm>
#include <cstring>

#include "scan/matrix_scan.h"
#include "scan/operands.h"
#include "scan/scan_drive.h"

namespace pentad::scan {

void matrix_update(const MatrixUpdate& p) {
  if (p.v.dtype == DType::f64 || p.keys > kUpdateKeys) return reference_matrix_update(p);
  if (p.heads == 0) return;
  const Kernels& level = kernels();
  const auto update = [&](int64_t i) {
    const int64_t b = i / p.heads, h = i % p.heads, group = h / (p.heads / p.groups);
    const int64_t row = p.rows.empty() ? b : p.rows[b];
    // (b, h or g, column)
    const auto token = [&](const Operand& x, int64_t index) {
      return strided(x, b * x.stride[0] + index * x.stride[1], x.stride[2]);
    };
    MatrixUpdateJob job = {};
    job.out = token(p.out, h);
    if (row < 0) {
      const int64_t bytes = size_of(p.out.dtype);
      for (int64_t j = 0; j < p.values; ++j)
        std::memset(static_cast<char*>(job.out.data) + j * job.out.channel * bytes, 0, bytes);
      return;
    }
    job.keys = p.keys;
    job.values = p.values;
    job.delta = p.delta;
    job.key_decay = p.key_decay;
    job.scale = static_cast<float>(p.scale);
    job.state = strided(p.state, row * p.state.stride[0] + h * p.state.stride[1], p.state.stride[2],
                        p.state.stride[3]);
    job.q = token(p.q, group);
    job.k = token(p.k, group);
    job.v = token(p.v, h);
    job.a = token(p.a, h);
    job.w = token(p.w, h);
    job.d = strided(p.d, h * p.d.stride[0], p.d.stride[1]);
    level.matrix_update(job);
  };
  // One piece for each thread, in order: from token to token a core meets the same states, of which
  // its cache still holds some. 128 heads of 64 and 64, two threads, a whole call from Python, us:
  // 31; 2 pieces for each thread 32, 4 32, 8 35, 16 37, one for each head 46.
  const int64_t all = p.batch * p.heads, pieces = std::min<int64_t>(all, num_threads());
  for_tasks(all * p.keys * p.values, pieces, [&](int64_t piece) {
    for (int64_t i = all * piece / pieces; i < all * (piece + 1) / pieces; ++i) update(i);
  });
}

}  // namespace pentad::scan
