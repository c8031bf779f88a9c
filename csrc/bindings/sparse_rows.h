// SPDX-License-Identifier: Apache-2.0
// Sparse rows as arguments; what stands in them is checked by sparse/csr.h.
#pragma once
#include <string>
#include <vector>

#include "bindings/lists.h"
#include "bindings/tensor_caster.h"
#include "sparse/csr.h"

namespace pentad::sparse {

// Three arrays of one argument, borrowed; indptr is copied.
struct GivenArrays {
  GivenRows given;
  std::vector<int64_t> indptr;
  TensorView indices, values;

  GivenArrays(const char* op, const char* name, const TensorView& starts, const TensorView& indices,
              const TensorView& values, int64_t columns)
      : indices(indices), values(values) {
    const std::string of = std::string(name) + "'s ";
    indptr = lists::integers(starts, op, (of + "indptr").c_str());
    expect(indices, op, (of + "indices").c_str(), {DType::i32, DType::i64}, 1);
    expect(values, op, (of + "values").c_str(), {DType::f32, DType::f16, DType::bf16, DType::f64},
           1);
    if (indptr.empty()) bad_value(op, of + "indptr is empty");
    if (indices.shape[0] != values.shape[0])
      bad_value(op, std::string(name) + " has " + std::to_string(indices.shape[0]) +
                        " indices but " + std::to_string(values.shape[0]) + " values");
    if (!is_contiguous(indices) || !is_contiguous(values))
      bad_value(op, std::string(name) + " is not contiguous");
    if (columns < 0 || columns > kMostColumns)
      bad_value(op, std::string(name) + " has " + std::to_string(columns) + " columns");
    given = {op,
             name,
             static_cast<int64_t>(indptr.size()) - 1,
             indices.shape[0],
             indptr.data(),
             indices.data,
             indices.dtype,
             values.data,
             values.dtype,
             columns};
  }
};

}  // namespace pentad::sparse
