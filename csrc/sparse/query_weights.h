// SPDX-License-Identifier: Apache-2.0
// Exact scores of documents by one query.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/reals.h"
#include "sparse/postings.h"
#include "sparse/search_drive.h"

namespace pentad::sparse {

// The weights of one query by term: open addressing, behind a filter for the many terms of a
// document that the query lacks.
class Weights {
 public:
  void set(const int32_t* terms, const float* weights, int64_t count) {
    int bits = 10;
    while (int64_t{1} << bits < (bits < kRoomyBits ? 32 : 2) * count) ++bits;
    if (bits != bits_) slots_.assign(size_t{1} << (bits_ = bits), 0);
    else
      for (uint32_t at : used_) slots_[at] = 0;
    terms_.assign(terms, terms + count);
    weights_.assign(weights, weights + count);
    used_.resize(count);
    std::fill_n(filter_, kFilterWords, 0u);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bit = filter_bit(terms[i]);
      filter_[bit / 32] |= 1u << bit % 32;
      uint32_t at = hash(terms[i]);
      while (slots_[at]) at = next(at);
      slots_[at] = static_cast<uint32_t>(i + 1);
      used_[i] = at;
    }
  }

  float score(const Forward& forward, int64_t document) const {
    const Span row = row_of(forward, document);
    switch (forward.dtype) {
      case DType::f32: {
        const auto* v = static_cast<const float*>(forward.values);
        return sum(forward, row, [&](int64_t j) { return v[j]; });
      }
      case DType::u8: {
        const auto* v = static_cast<const uint8_t*>(forward.values);
        const float scale = forward.scale[document];
        return sum(forward, row, [&](int64_t j) { return scale * v[j]; });
      }
      default: {
        const auto* v = static_cast<const uint16_t*>(forward.values);
        return sum(forward, row, [&](int64_t j) { return finite_half(v[j]); });
      }
    }
  }

 private:
  static constexpr int kRoomyBits = 20;  // of the table, from which it is fuller

  uint32_t hash(int32_t term) const { return static_cast<uint32_t>(term) * kHash >> (32 - bits_); }
  uint32_t next(uint32_t at) const { return (at + 1) & static_cast<uint32_t>(slots_.size() - 1); }

  // First the entries that pass a filter of 1,024 bits, without a branch, as no one could foresee
  // it; then the products of those whose term it is.
  template <class Value>
  float sum(const Forward& forward, Span row, const Value& value) const {
    constexpr int64_t kStep = 256;
    uint16_t taken[kStep + 16];
    double total = 0;
    for (int64_t first = row.begin; first < row.end; first += kStep) {
      const int32_t* terms = forward.terms + first;
      const int64_t size = std::min(kStep, row.end - first);
      const int64_t count = search_kernels().pass_filter(terms, size, filter_, taken);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t term = terms[taken[i]];
        for (uint32_t at = hash(term), slot; (slot = slots_[at]); at = next(at)) {
          if (terms_[slot - 1] != term) continue;
          total += static_cast<double>(weights_[slot - 1]) * value(first + taken[i]);
          break;
        }
      }
    }
    return static_cast<float>(total) + 0.0f;
  }

  int bits_ = 0;
  std::vector<uint32_t> slots_;  // the number of a term plus 1
  std::vector<int32_t> terms_;
  std::vector<float> weights_;
  std::vector<uint32_t> used_;  // slots
  uint32_t filter_[kFilterWords];
};

// Inlined, or the compiler drops what only prefetches.
inline __attribute__((always_inline)) void prefetch(const Forward& forward, int64_t document) {
  const Span row = row_of(forward, document);
  const char* values = static_cast<const char*>(forward.values);
  const int64_t size = size_of(forward.dtype);
  for (int64_t j = row.begin; j < row.end; j += 16) __builtin_prefetch(forward.terms + j);
  for (int64_t j = row.begin; j < row.end; j += 64 / size) __builtin_prefetch(values + j * size);
}

}  // namespace pentad::sparse
