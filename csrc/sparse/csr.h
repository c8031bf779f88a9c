// SPDX-License-Identifier: Apache-2.0
// Sparse rows as callers have them, checked and brought into one form.
//
//   indptr   (rows + 1,) rises from 0 to nnz
//   indices  (nnz,) int32 or int64 in [0, columns), in any order, duplicates allowed
//   values   (nnz,) float16, bfloat16, float32 or float64, finite
//
// In the one form the terms of a row rise, none twice, as int32; values are float32 or float64. The
// value of a duplicated term is the double sum of its values in the caller's order, rounded once, to
// float32 unless they are float64; explicit zeros stay.
#pragma once
#include <cstdint>
#include <vector>

#include "common/scratch.h"
#include "common/tensor_view.h"

namespace pentad::sparse {

constexpr int64_t kMostColumns = (int64_t{1} << 31) - 1;

// Contiguous arrays. `indptr` must be a copy that nobody changes.
struct GivenRows {
  const char* op;
  const char* name;
  int64_t rows, nnz;
  const int64_t* indptr;
  const void* indices;
  DType index_dtype;
  const void* values;
  DType dtype;
  int64_t columns;
};

struct Found {
  bool canonical;  // terms rise in every row
  int64_t last;    // the greatest index, -1 where there is none
};

// Throws std::invalid_argument for contents that the head of this file does not allow.
Found check(const GivenRows& given);

// Sorts and merges rows that `check` accepted. `indices` and `values` (float32, or float64 for
// `wide` f64) have room for nnz, indptr for rows + 1; place[i] is where value i went. Returns the
// number of terms; throws for duplicates whose sum is not finite.
int64_t merge(const GivenRows& given, DType wide, int64_t* indptr, int32_t* indices, void* values,
              int64_t* place);

// Rows in the one form, for a kernel. Borrows what is in it already.
template <class T>
struct Rows {
  int64_t rows, nnz;
  const int64_t* indptr;
  const int32_t* indices;
  const T* values;
};

class CanonicalRows {
 public:
  // Checks; T is double for `wide` f64, else float.
  CanonicalRows(const GivenRows& given, DType wide);

  template <class T>
  Rows<T> rows() const {
    return {rows_, nnz_, indptr_, indices_, static_cast<const T*>(values_)};
  }
  int64_t nnz() const { return nnz_; }
  // Whether each of the caller's values stands at its own position.
  bool in_place() const { return !place_.get(); }
  // A gradient (nnz) as one of the caller's values (given.nnz).
  template <class T>
  void to_caller(const T* gradient, T* out) const;

 private:
  int64_t rows_, nnz_, given_;
  const int64_t* indptr_;
  const int32_t* indices_;
  const void* values_;
  Scratch<int64_t> own_indptr_, place_;
  Scratch<int32_t> own_indices_;
  ScratchBytes own_values_;
};

}  // namespace pentad::sparse
