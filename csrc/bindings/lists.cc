// SPDX-License-Identifier: Apache-2.0
#include "bindings/lists.h"

#include <algorithm>

namespace pentad::lists {

void expect_shape(const TensorView& view, const char* op, const char* name,
                  std::initializer_list<int64_t> shape) {
  if (view.rank == static_cast<int>(shape.size()) &&
      std::equal(shape.begin(), shape.end(), view.shape))
    return;
  std::string expected;
  for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  bad_value(op, std::string(name) + " has shape " + shape_text(view) + ", expected (" + expected +
                    (shape.size() == 1 ? ",)" : ")"));
}

std::vector<int64_t> integers(const TensorView& view, const char* op, const char* name) {
  expect(view, op, name, {DType::i32, DType::i64}, 1);
  std::vector<int64_t> copy(view.shape[0]);
  for (int64_t i = 0; i < view.shape[0]; ++i) {
    const int64_t at = i * view.strides[0];
    copy[i] = view.dtype == DType::i32 ? static_cast<const int32_t*>(view.data)[at]
                                       : static_cast<const int64_t*>(view.data)[at];
  }
  return copy;
}

std::vector<int64_t> boundaries(const TensorView& view, int64_t total, const char* op,
                                const char* name, const char* things) {
  std::vector<int64_t> copy = integers(view, op, name);
  if (copy.empty() || copy[0] != 0) bad_value(op, std::string(name) + " does not begin with 0");
  for (size_t i = 1; i < copy.size(); ++i)
    if (copy[i] < copy[i - 1])
      bad_value(op, std::string(name) + " descends from " + std::to_string(copy[i - 1]) + " to " +
                        std::to_string(copy[i]));
  if (copy.back() != total)
    bad_value(op, std::string(name) + " ends with " + std::to_string(copy.back()) +
                      ", but there are " + std::to_string(total) + " " + things);
  return copy;
}

std::vector<int64_t> cache_rows(const TensorView& view, int64_t batch, int64_t rows, const char* op,
                                const char* name) {
  std::vector<int64_t> copy = integers(view, op, name);
  expect_shape(view, op, name, {batch});
  std::vector<int64_t> used;
  for (int64_t row : copy) {
    if (row >= rows)
      bad_value(op, std::string(name) + " holds " + std::to_string(row) + ", but there are " +
                        std::to_string(rows) + " rows");
    if (row >= 0) used.push_back(row);
  }
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  if (twice != used.end())
    bad_value(op, std::string(name) + " has row " + std::to_string(*twice) + " twice");
  return copy;
}

}  // namespace pentad::lists
