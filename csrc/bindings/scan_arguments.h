// SPDX-License-Identifier: Apache-2.0
// Turns arrays into the problems of scan.h.
#pragma once
#include <string>
#include <vector>

#include "bindings/tensor_caster.h"
#include "bindings/writes.h"
#include "scan/scan.h"

namespace pentad::scan {

using Optional = std::optional<TensorView>;
using Shape = std::vector<int64_t>;

// The arrays of one call. Each is checked for its dtype and its shape, then listed as one that is
// read or written; `writes.finish()` is due before the kernel runs.
class Arguments {
 public:
  Writes writes;

  // `cuda`: the operation has CUDA kernels; its arguments are where the first one is.
  Arguments(const char* op, bool complex, bool cuda = false)
      : writes(op), op_(op), complex_(complex), cuda_(cuda) {}

  // Fixes the dtype of the problem by an array of this rank.
  void set_dtype(const TensorView& view, const char* name, int rank, bool parts);
  DType dtype() const { return dtype_; }
  // Of A and the like, and of gradients that are sums.
  DType wide() const { return dtype_ == DType::f64 ? DType::f64 : DType::f32; }
  // What a weight of its own dtype may have.
  std::vector<DType> own() const;

  // An absent array is an empty operand. `parts`: with a last dimension of 2 where the problem is
  // complex.
  Operand input(const Optional& view, const char* name, const std::vector<DType>& dtypes,
                const Shape& shape, bool parts = false);
  Operand output(const Optional& view, const char* name, const std::vector<DType>& dtypes,
                 const Shape& shape, bool parts = false);

  // `name` can be asked for only beside `other`.
  void needs(const Optional& view, const char* name, bool other, const char* other_name) const;
  // Boundaries of the pieces of a batch of one.
  std::vector<int64_t> boundaries(const Optional& view, int64_t batch, int64_t length) const;
  std::vector<int64_t> rows(const Optional& view, const char* name, int64_t batch,
                            int64_t state_rows, const char* state_name) const;
  [[noreturn]] void refuse(const std::string& message) const { bad_value(op_, message); }
  const char* op() const { return op_; }
  Device on() const { return on_; }

 private:
  Operand operand(const TensorView& view, const char* name, const std::vector<DType>& dtypes,
                  Shape shape, bool parts) const;

  const char* op_;
  bool complex_, cuda_;
  Device on_;
  DType dtype_ = DType::f32;
};

}  // namespace pentad::scan
