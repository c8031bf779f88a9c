// SPDX-License-Identifier: Apache-2.0
// What the drivers of this family share.
#pragma once
#include <cstdint>
#include <functional>

#include "common/parallel.h"

namespace pentad::scan {

// parallel_for, or a plain loop where all of it is a few microseconds' work and waking threads would
// cost more. `work`: vectorised element operations.
inline void for_tasks(int64_t work, int64_t tasks, const std::function<void(int64_t)>& task) {
  constexpr int64_t kSmall = 1 << 16;
  if (work > kSmall) return parallel_for(tasks, task);
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

inline int64_t padded_channels(int64_t channels, int64_t lanes) {
  return (channels + lanes - 1) / lanes * lanes;
}

}  // namespace pentad::scan
