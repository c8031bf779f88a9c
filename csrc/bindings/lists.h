// SPDX-License-Identifier: Apache-2.0
// Lists of integers as arguments. They are copied first, and the copies are checked and used: the
// arrays may change under a running kernel.
#pragma once
#include <cstdint>
#include <vector>

#include "bindings/tensor_caster.h"

namespace pentad::lists {

void expect_shape(const TensorView& view, const char* op, const char* name,
                  std::initializer_list<int64_t> shape);

// A copy of an int32 or int64 array of one dimension.
std::vector<int64_t> integers(const TensorView& view, const char* op, const char* name);

// Boundaries of packed sequences: ascending from 0 to `total`, a number of `things`.
std::vector<int64_t> boundaries(const TensorView& view, int64_t total, const char* op,
                                const char* name, const char* things);

// A row of [0, rows) for each of `batch` sequences, none twice; negative: no row.
std::vector<int64_t> cache_rows(const TensorView& view, int64_t batch, int64_t rows, const char* op,
                                const char* name);

}  // namespace pentad::lists
