// SPDX-License-Identifier: Apache-2.0
// Outputs of any strides: refuses those that are read-only or overlap.
#pragma once
#include <cstdint>
#include <vector>

#include "bindings/tensor_caster.h"

namespace pentad {

int64_t count(const TensorView& view);

// Two outputs may interleave, as the slices of one packed array do, so what is refused beside
// overlap within one is the plain cases of overlap between two: a common first address, or dense
// arrays that meet.
class Writes {
 public:
  explicit Writes(const char* op) : op_(op) { inputs_.reserve(16), outputs_.reserve(4); }

  void input(const char* name, const TensorView& view);
  void input(const char* name, const std::optional<TensorView>& view);
  void output(const char* name, const TensorView& view);
  // Outputs against inputs, when all are known.
  void finish() const;

 private:
  struct Extent {
    const char* name;
    uintptr_t begin, end;  // memory that the argument occupies
    bool dense;            // without holes
  };
  static Extent extent(const char* name, const TensorView& view);
  void check(const Extent& a, const Extent& b) const;

  const char* op_;
  std::vector<Extent> inputs_, outputs_;
};

}  // namespace pentad
