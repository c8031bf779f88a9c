// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "attention/attention_drive.h"

namespace pentad::attention {
namespace {

void copy_row(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t size,
              int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    std::memcpy(to, from, n * size);
    return;
  }
  for (int64_t d = 0; d < n; ++d)
    std::memcpy(to + d * to_stride * size, from + d * from_stride * size, size);
}

}  // namespace

void append(const Problem& p, const std::vector<int64_t>& cache_length, const Operand& k_new,
            const Operand& v_new, int64_t new_tokens) {
  const auto copy = [&](const Operand& from, const Operand& to, int64_t dim, int64_t b, int64_t h) {
    const int64_t size = size_of(to.dtype);
    for (int64_t t = 0; t < new_tokens; ++t)
      copy_row(static_cast<const char*>(q_at(p, from, b, h, t)), from.stride[3],
               static_cast<char*>(const_cast<void*>(k_at(p, to, b, h, cache_length[b] + t))),
               to.stride[3], size, dim);
  };
  const auto task = [&](int64_t n) {
    copy(k_new, p.k, p.dim, n / p.kv_heads, n % p.kv_heads);
    copy(v_new, p.v, p.value_dim, n / p.kv_heads, n % p.kv_heads);
  };
  const int64_t tasks = p.batch * p.kv_heads;
  // Waking threads costs more than copying the few rows of a decoding step.
  if (tasks * new_tokens * (p.dim + p.value_dim) < 1 << 16)
    for (int64_t n = 0; n < tasks; ++n) task(n);
  else parallel_for(tasks, task);
}

}  // namespace pentad::attention
