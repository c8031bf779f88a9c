// SPDX-License-Identifier: Apache-2.0
#include "bindings/scan_arguments.h"

#include <algorithm>

#include "bindings/lists.h"

namespace pentad::scan {

void Arguments::set_dtype(const TensorView& view, const char* name, int rank, bool parts) {
  if (cuda_) on_ = device_of(view);
  expect(view, op_, name, {DType::f32, DType::bf16, DType::f16, DType::f64},
         rank + (parts && complex_ ? 1 : 0), on_);
  dtype_ = view.dtype;
}

std::vector<DType> Arguments::own() const {
  if (dtype_ == DType::f64) return {DType::f64};
  return {DType::f32, DType::bf16, DType::f16};
}

Operand Arguments::operand(const TensorView& view, const char* name,
                           const std::vector<DType>& dtypes, Shape shape, bool parts) const {
  if (parts && complex_) shape.push_back(2);
  // The rank and the device first; the dtype's message then names what goes with the others.
  expect(view, op_, name, {view.dtype}, static_cast<int>(shape.size()), on_);
  if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
    std::string accepted;
    for (DType dtype : dtypes)
      accepted += (accepted.empty() ? "" : ", ") + std::string(dtype_name(dtype));
    throw TypeMismatch("[" + std::string(op_) + "] " + name + " has dtype " +
                       dtype_name(view.dtype) + ", expected " + accepted);
  }
  if (!std::equal(shape.begin(), shape.end(), view.shape)) {
    std::string expected;
    for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    refuse(std::string(name) + " has shape " + shape_text(view) + ", expected (" + expected +
           (shape.size() == 1 ? ",)" : ")"));
  }
  Operand result{view.data, view.dtype, {}};
  std::copy_n(view.strides, view.rank, result.stride);
  return result;
}

Operand Arguments::input(const Optional& view, const char* name, const std::vector<DType>& dtypes,
                         const Shape& shape, bool parts) {
  if (!view) return {};
  writes.input(name, *view);
  return operand(*view, name, dtypes, shape, parts);
}

Operand Arguments::output(const Optional& view, const char* name, const std::vector<DType>& dtypes,
                          const Shape& shape, bool parts) {
  if (!view) return {};
  const Operand result = operand(*view, name, dtypes, shape, parts);
  writes.output(name, *view);
  return result;
}

void Arguments::needs(const Optional& view, const char* name, bool other,
                      const char* other_name) const {
  if (view && !other) refuse(std::string(name) + " needs " + other_name);
}

std::vector<int64_t> Arguments::boundaries(const Optional& view, int64_t batch,
                                           int64_t length) const {
  if (!view) return {};
  if (batch != 1) refuse("cu_seqlens need a batch of 1, but the batch is " + std::to_string(batch));
  return lists::boundaries(*view, length, op_, "cu_seqlens", "steps");
}

std::vector<int64_t> Arguments::rows(const Optional& view, const char* name, int64_t batch,
                                     int64_t state_rows, const char* state_name) const {
  if (view) return lists::cache_rows(*view, batch, state_rows, op_, name);
  if (state_rows != batch)
    refuse(std::string(state_name) + " has " + std::to_string(state_rows) +
           " rows for a batch of " + std::to_string(batch) + ", which needs " + name);
  return {};
}

}  // namespace pentad::scan
