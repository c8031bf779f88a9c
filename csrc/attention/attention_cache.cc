// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "attention/attention.h"
#include "common/parallel.h"

namespace pentad::attention {
namespace {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    default: return 2;
  }
}

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
    const int64_t size = element_size(to.dtype);
    for (int64_t t = 0; t < new_tokens; ++t) {
      int64_t position = cache_length[b] + t, row = p.cache_row.empty() ? b : p.cache_row[b];
      if (p.page_size) {
        row = p.block_table[b * p.pages_per_sequence + position / p.page_size];
        position %= p.page_size;
      } else if (!p.left_pad.empty()) {
        position += p.left_pad[b];
      }
      const int64_t source = b * from.stride[0] + h * from.stride[1] + t * from.stride[2];
      const int64_t target = row * to.stride[0] + h * to.stride[1] + position * to.stride[2];
      copy_row(static_cast<const char*>(from.data) + source * size, from.stride[3],
               static_cast<char*>(to.data) + target * size, to.stride[3], size, dim);
    }
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
