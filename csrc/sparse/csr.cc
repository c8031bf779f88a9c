// SPDX-License-Identifier: Apache-2.0
// Pieces of equal numbers of entries are checked beside each other; rows are sorted by pieces of
// rows. What is wrong is looked for again, in order, so that the message names the first.
#include "sparse/csr.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/reals.h"

namespace pentad::sparse {
namespace {

constexpr int64_t kPiece = 1 << 15;   // entries
constexpr int64_t kSerial = 1 << 16;  // entries, below which waking threads does not pay

[[noreturn]] void refuse(const GivenRows& g, const std::string& what) {
  throw std::invalid_argument("[" + std::string(g.op) + "] " + g.name + " " + what);
}

std::string number_text(double x) {
  if (std::isnan(x)) return "NaN";
  return x < 0 ? "-infinity" : "infinity";
}

int64_t read_index(const GivenRows& g, int64_t i) {
  if (g.index_dtype == DType::i64) return static_cast<const int64_t*>(g.indices)[i];
  return static_cast<const int32_t*>(g.indices)[i];
}

void check_indptr(const GivenRows& g) {
  if (g.indptr[0] != 0)
    refuse(g, "has an indptr that begins with " + std::to_string(g.indptr[0]) + ", expected 0");
  for (int64_t i = 0; i < g.rows; ++i)
    if (g.indptr[i] > g.indptr[i + 1])
      refuse(g, "has an indptr that descends from " + std::to_string(g.indptr[i]) + " to " +
                    std::to_string(g.indptr[i + 1]));
  if (g.indptr[g.rows] != g.nnz)
    refuse(g, "has an indptr that ends with " + std::to_string(g.indptr[g.rows]) + ", expected " +
                  std::to_string(g.nnz) + ", the number of indices");
}

// Of the entries [begin, end).
struct Piece {
  int64_t last = -1;
  uint64_t most = 0;     // of the indices as unsigned: negative ones are beyond all columns
  int64_t descents = 0;  // indices not above the one before, also across rows
  bool infinite = false;
};

template <class I>
void read_indices(const I* indices, int64_t begin, int64_t end, Piece& piece) {
  using U = std::make_unsigned_t<I>;
  U most = 0;
  for (int64_t i = begin; i < end; ++i) most = std::max(most, static_cast<U>(indices[i]));
  int64_t descents = 0;
  for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i)
    descents += indices[i] <= indices[i - 1];
  piece.most = most, piece.descents = descents;
}

// Whether any has all bits of the exponent set.
template <class U>
bool any_infinite(const void* values, int64_t begin, int64_t end, U exponent) {
  const U* bits = static_cast<const U*>(values);
  U found = 0;
  for (int64_t i = begin; i < end; ++i) found |= static_cast<U>((bits[i] & exponent) == exponent);
  return found;
}

bool any_infinite(const GivenRows& g, int64_t begin, int64_t end) {
  switch (g.dtype) {
    case DType::f16: return any_infinite<uint16_t>(g.values, begin, end, 0x7c00);
    case DType::bf16: return any_infinite<uint16_t>(g.values, begin, end, 0x7f80);
    case DType::f32: return any_infinite<uint32_t>(g.values, begin, end, 0x7f800000);
    default: return any_infinite<uint64_t>(g.values, begin, end, uint64_t{0x7ff} << 52);
  }
}

[[noreturn]] void refuse_first(const GivenRows& g) {
  for (int64_t i = 0; i < g.nnz; ++i) {
    const int64_t index = read_index(g, i);
    if (index < 0) refuse(g, "has the index " + std::to_string(index) + ", expected none below 0");
    if (index >= g.columns)
      refuse(g, "has an index " + std::to_string(index) + " past its " + std::to_string(g.columns) +
                    " columns");
    const double value = read_real(g.values, g.dtype, i);
    if (!std::isfinite(value))
      refuse(g, "has the value " + number_text(value) + ", expected finite ones");
  }
  refuse(g, "changed during the call");
}

// Values [begin, end) in float or double, at `out`.
template <class T>
void widen(const GivenRows& g, int64_t begin, int64_t end, T* out) {
  switch (g.dtype) {
    case DType::f32: {
      const float* from = static_cast<const float*>(g.values);
      for (int64_t i = begin; i < end; ++i) *out++ = static_cast<T>(from[i]);
      break;
    }
    case DType::f64: {
      const double* from = static_cast<const double*>(g.values);
      for (int64_t i = begin; i < end; ++i) *out++ = static_cast<T>(from[i]);
      break;
    }
    case DType::f16: {
      const uint16_t* from = static_cast<const uint16_t*>(g.values);
      for (int64_t i = begin; i < end; ++i) *out++ = finite_half(from[i]);
      break;
    }
    default: {
      const uint16_t* from = static_cast<const uint16_t*>(g.values);
      for (int64_t i = begin; i < end; ++i) *out++ = static_cast<float>(real_from_bf16(from[i]));
    }
  }
}

// Boundaries of pieces of rows of about kPiece entries.
std::vector<int64_t> row_pieces(const GivenRows& g) {
  std::vector<int64_t> bounds = {0};
  for (int64_t row = 0; row < g.rows; ++row)
    if (g.indptr[row + 1] - g.indptr[bounds.back()] + row - bounds.back() >= kPiece)
      bounds.push_back(row + 1);
  if (bounds.back() < g.rows) bounds.push_back(g.rows);
  return bounds;
}

template <class Task>
void for_rows(const GivenRows& g, const Task& task) {
  const std::vector<int64_t> bounds = row_pieces(g);
  parallel_for_if(g.nnz > kSerial, static_cast<int64_t>(bounds.size()) - 1,
                  [&](int64_t i) { task(bounds[i], bounds[i + 1]); });
}

// As the head of csr.h has it, whatever T the sum is then stored in.
template <class T>
T round_sum(double sum, DType dtype) {
  return static_cast<T>(dtype == DType::f64 ? sum : static_cast<float>(sum));
}

template <class T>
int64_t merge_into(const GivenRows& g, int64_t* indptr, int32_t* indices, T* values,
                   int64_t* place) {
  // First where each entry stands in its own row, then, with the sizes known, in all.
  for_rows(g, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> keys;
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = g.indptr[row], length = g.indptr[row + 1] - begin;
      if (length > int64_t{UINT32_MAX})
        refuse(g, "has a row of " + std::to_string(length) + " entries");
      keys.resize(length);
      for (int64_t i = 0; i < length; ++i)
        keys[i] = static_cast<uint64_t>(read_index(g, begin + i)) << 32 | static_cast<uint64_t>(i);
      if (!std::is_sorted(keys.begin(), keys.end())) std::sort(keys.begin(), keys.end());
      int64_t slot = -1;
      for (int64_t i = 0; i < length; ++i) {
        slot += i == 0 || keys[i] >> 32 != keys[i - 1] >> 32;
        place[begin + static_cast<uint32_t>(keys[i])] = slot;
      }
      indptr[row + 1] = slot + 1;
    }
  });
  indptr[0] = 0;
  for (int64_t row = 0; row < g.rows; ++row) indptr[row + 1] += indptr[row];
  std::atomic<bool> infinite{false};
  for_rows(g, [&](int64_t first, int64_t last) {
    std::vector<double> sums;
    for (int64_t row = first; row < last; ++row) {
      const int64_t base = indptr[row], count = indptr[row + 1] - base;
      sums.assign(count, 0.0);
      for (int64_t i = g.indptr[row]; i < g.indptr[row + 1]; ++i) {
        const int64_t slot = place[i];
        sums[slot] += read_real(g.values, g.dtype, i);
        indices[base + slot] = static_cast<int32_t>(read_index(g, i));
        place[i] = base + slot;
      }
      for (int64_t slot = 0; slot < count; ++slot) {
        const T value = round_sum<T>(sums[slot], g.dtype);
        if (!std::isfinite(value)) infinite = true;
        values[base + slot] = value;
      }
    }
  });
  if (infinite) refuse(g, "has duplicates whose sum is not finite");
  return indptr[g.rows];
}

}  // namespace

Found check(const GivenRows& g) {
  check_indptr(g);
  const int64_t pieces = ceil_div(g.nnz, kPiece);
  std::vector<Piece> found(pieces);
  parallel_for_if(g.nnz > kSerial, pieces, [&](int64_t p) {
    const int64_t begin = p * kPiece, end = std::min(g.nnz, begin + kPiece);
    if (g.index_dtype == DType::i64)
      read_indices(static_cast<const int64_t*>(g.indices), begin, end, found[p]);
    else read_indices(static_cast<const int32_t*>(g.indices), begin, end, found[p]);
    found[p].infinite = any_infinite(g, begin, end);
  });
  int64_t descents = 0;
  uint64_t most = 0;
  bool infinite = false;
  for (const Piece& piece : found) {
    most = std::max(most, piece.most), descents += piece.descents, infinite |= piece.infinite;
  }
  if (infinite || (g.nnz && most >= static_cast<uint64_t>(g.columns))) refuse_first(g);
  for (int64_t row = 1; row < g.rows && descents; ++row) {
    const int64_t i = g.indptr[row];  // a descent from row to row is none
    if (i && i < g.indptr[row + 1]) descents -= read_index(g, i) <= read_index(g, i - 1);
  }
  return {descents == 0, g.nnz ? static_cast<int64_t>(most) : -1};
}

int64_t merge(const GivenRows& given, DType wide, int64_t* indptr, int32_t* indices, void* values,
              int64_t* place) {
  if (wide == DType::f64)
    return merge_into(given, indptr, indices, static_cast<double*>(values), place);
  return merge_into(given, indptr, indices, static_cast<float*>(values), place);
}

CanonicalRows::CanonicalRows(const GivenRows& g, DType wide)
    : rows_(g.rows), nnz_(g.nnz), given_(g.nnz), indptr_(g.indptr) {
  const bool canonical = check(g).canonical;
  indices_ = static_cast<const int32_t*>(g.indices);
  values_ = g.values;
  const bool copied = !canonical || g.index_dtype != DType::i32;
  const bool widened = !canonical || g.dtype != wide;
  if (copied) own_indices_ = Scratch<int32_t>(g.nnz), indices_ = own_indices_.get();
  if (widened) own_values_ = ScratchBytes(g.nnz * size_of(wide)), values_ = own_values_.get();
  if (!canonical) {
    own_indptr_ = Scratch<int64_t>(g.rows + 1), place_ = Scratch<int64_t>(g.nnz);
    indptr_ = own_indptr_.get();
    nnz_ = merge(g, wide, own_indptr_.get(), own_indices_.get(), own_values_.get(), place_.get());
    return;
  }
  if (!copied && !widened) return;
  parallel_for_if(g.nnz > kSerial, ceil_div(g.nnz, kPiece), [&](int64_t p) {
    const int64_t begin = p * kPiece, end = std::min(g.nnz, begin + kPiece);
    if (copied)
      for (int64_t i = begin; i < end; ++i)
        own_indices_.get()[i] = static_cast<int32_t>(static_cast<const int64_t*>(g.indices)[i]);
    if (!widened) return;
    if (wide == DType::f64) widen(g, begin, end, static_cast<double*>(own_values_.get()) + begin);
    else widen(g, begin, end, static_cast<float*>(own_values_.get()) + begin);
  });
}

template <class T>
void CanonicalRows::to_caller(const T* gradient, T* out) const {
  if (!place_.get()) {
    if (given_ && gradient != out) std::memcpy(out, gradient, given_ * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < given_; ++i) out[i] = gradient[place_.get()[i]];
}
template void CanonicalRows::to_caller(const float*, float*) const;
template void CanonicalRows::to_caller(const double*, double*) const;

}  // namespace pentad::sparse
