// SPDX-License-Identifier: Apache-2.0
// One token on a cache of states: cut into sequences, groups of rows that share B and C, and blocks
// of rows.
#include "scan/state_update_kernels.h"

#include <algorithm>
#include <cstring>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "scan/operands.h"
#include "scan/scan.h"

namespace pentad::scan {
namespace {

constexpr int64_t kBlockStates = 1 << 13;  // of a task, about
constexpr int64_t kSmall = 1 << 16;        // states that one thread updates alone, 10 us

}  // namespace

void state_update(const StateUpdate& p) {
  if (p.x.dtype == DType::f64) return reference_state_update(p);
  // Rows: the channels of a head, or the heads of a group where heads have one channel.
  const bool by_head = p.head_dim > 1;
  const int64_t sets = by_head ? p.heads : p.groups;
  if (sets == 0 || p.batch == 0 || p.head_dim == 0) return;
  const int64_t rows = by_head ? p.head_dim : p.heads / p.groups;
  const int axis = by_head ? 1 : 0;  // of (h, p) that the rows run along
  const int64_t most = std::max<int64_t>(64, kBlockStates / std::max<int64_t>(1, p.states));
  const int64_t blocks = ceil_div(rows, most);
  const auto task = [&](int64_t i) {
    const int64_t block = i % blocks, set = i / blocks % sets, b = i / blocks / sets;
    const int64_t first = block * most, count = std::min(most, rows - first);
    const int64_t h = by_head ? set : set * rows + first, channel = by_head ? first : 0;
    const int64_t group = by_head ? set / (p.heads / p.groups) : set;
    const int64_t row = p.rows.empty() ? b : p.rows[b];
    // (b, h, p), and the same without b.
    const auto per_token = [&](const Operand& x) {
      return strided(x, b * x.stride[0] + h * x.stride[1] + channel * x.stride[2],
                     x.stride[1 + axis]);
    };
    const auto per_row = [&](const Operand& x) {
      return strided(x, h * x.stride[0] + channel * x.stride[1], x.stride[axis]);
    };
    StateUpdateJob job{};
    job.out = per_token(p.out);
    if (row < 0) {
      const int64_t bytes = size_of(p.out.dtype);
      for (int64_t r = 0; r < count; ++r)
        std::memset(static_cast<char*>(job.out.data) + r * job.out.channel * bytes, 0, bytes);
      return;
    }
    job.rows = count;
    job.states = p.states;
    job.softplus = p.softplus;
    job.state = strided(
        p.state, row * p.state.stride[0] + h * p.state.stride[1] + channel * p.state.stride[2],
        p.state.stride[1 + axis], p.state.stride[3]);
    job.a = per_row(p.a);
    job.a.time = p.a.stride[2];
    job.b = strided(p.b, b * p.b.stride[0] + group * p.b.stride[1], 0, p.b.stride[2]);
    job.c = strided(p.c, b * p.c.stride[0] + group * p.c.stride[1], 0, p.c.stride[2]);
    job.x = per_token(p.x);
    job.dt = per_token(p.dt);
    job.z = per_token(p.z);
    job.d = per_row(p.d);
    job.dt_bias = per_row(p.dt_bias);
    kernels().state_update(job);
  };
  const int64_t tasks = p.batch * sets * blocks;
  if (p.batch * p.heads * p.head_dim * p.states > kSmall) return parallel_for(tasks, task);
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace pentad::scan
