// SPDX-License-Identifier: Apache-2.0
// A row's threshold is its k-th largest key. A sample brackets it, one pass counts what lies above
// and inside the bracket, and only the keys inside (some hundreds) are put in order. Where the
// sample misleads, the count says so and the bracket becomes the side that holds the threshold.
//
// Microseconds for a row of 65,536 float32 numbers, one thread, k = 64 and k = 30,000: this 42 and
// 166; keys in a pass of their own 49 and 167; scalar loops left to the compiler 56 and 180;
// torch.topk 106 and 800. For 16,384 numbers and k = 64: a sample of one in 32 12, of one in 64,
// which leaves twice the candidates, 25. Vectors wider than 16 bytes, for which units of each level
// would be needed, were not tried.
#include "sparse/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pentad::sparse {
namespace {

constexpr int64_t kLeastSampled = 256;    // columns below which all keys are put in order
constexpr int64_t kTaskWork = 1 << 15;    // columns of a task
constexpr int64_t kSerialWork = 1 << 14;  // columns below which threads do not pay
constexpr int64_t kFew = 8;               // keys that are appended together
constexpr int64_t kBlock = 32;            // keys that are looked at together
constexpr int64_t kCountBlock = 1 << 13;  // keys whose count an int16 holds

constexpr int64_t kBytes = 16;  // of a vector: what every processor has

template <class Key>
struct VectorOf {
  typedef Key type __attribute__((vector_size(kBytes)));
  static constexpr int64_t kLanes = kBytes / sizeof(Key);
};
template <class Key>
using Vector = typename VectorOf<Key>::type;

template <class Key>
Vector<Key> load(const Key* from) {
  Vector<Key> v;
  std::memcpy(&v, from, kBytes);
  return v;
}

// Sign and magnitude become two's complement, so -0 is 0; every NaN is the largest key.
template <class Key>
struct Keys {
  Key infinity;  // its bits
  bool absolute;

  // Of one number's bits, or a vector of them.
  template <class Bits>
  Bits of(Bits bits) const {
    constexpr Key kMost = std::numeric_limits<Key>::max();
    const Bits magnitude = bits & kMost;
    const Bits sign = absolute ? Bits{} : Bits(bits >> (8 * sizeof(Key) - 1));
    const Bits key = Bits((magnitude ^ sign) - sign);
    return magnitude > infinity ? Bits{} + kMost : key;
  }
};

// What is kept: keys above `key`, and the first `ties` equal to it, which are all of them or not.
template <class Key>
struct Threshold {
  Key key;
  int64_t ties;
  bool all_ties;
};

// Writes the keys of a row; returns how many are at least `low` and how many above `high`.
template <class Key>
std::pair<int64_t, int64_t> make_keys(const Key* bits, int64_t columns, Keys<Key> order, Key low,
                                      Key high, Key* keys) {
  constexpr int64_t kLanes = VectorOf<Key>::kLanes;
  int64_t from = 0, above = 0, i = 0;
  while (i + kLanes <= columns) {
    Vector<Key> below = {}, over = {};  // below low: the complement of what is counted
    const int64_t begin = i, end = std::min(columns - kLanes, i + kCountBlock);
    for (; i <= end; i += kLanes) {
      const Vector<Key> v = order.of(load(bits + i));
      std::memcpy(keys + i, &v, kBytes);
      below -= v < low;
      over -= v > high;
    }
    from += i - begin;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      from -= below[lane];
      above += over[lane];
    }
  }
  for (; i < columns; ++i) {
    keys[i] = order.of(bits[i]);
    from += keys[i] >= low;
    above += keys[i] > high;
  }
  return {from, above};
}

// Whether any of kSize keys is in [low, high].
template <int64_t kSize = kBlock, class Key>
bool any_in(const Key* keys, Key low, Key high) {
  typedef int64_t Pair __attribute__((vector_size(kBytes)));
  Vector<Key> out = load(keys);
  out = (out < low) | (out > high);
  for (int64_t i = VectorOf<Key>::kLanes; i < kSize; i += VectorOf<Key>::kLanes) {
    const Vector<Key> v = load(keys + i);
    out &= (v < low) | (v > high);
  }
  const Pair none = (Pair)out;
  return (none[0] & none[1]) != -1;
}

template <class Key>
int64_t collect(const Key* keys, int64_t columns, Key low, Key high, Key* out) {
  int64_t size = 0, i = 0;
  const auto append = [&](Key key) {
    out[size] = key;
    size += (key >= low) & (key <= high);
  };
  for (; i + kBlock <= columns; i += kBlock)
    if (any_in(keys + i, low, high))
      for (int64_t j = i; j < i + kBlock; j += kFew)
        if (any_in<kFew>(keys + j, low, high))
          for (int64_t l = j; l < j + kFew; ++l) append(keys[l]);
  for (; i < columns; ++i) append(keys[i]);
  return size;
}

// A range of keys that holds the k-th largest, how many lie above it and how many in it or above.
template <class Key>
struct Bracket {
  Key low = std::numeric_limits<Key>::min(), high = std::numeric_limits<Key>::max();
  int64_t above = 0, from = 0;
};

// Writes the keys of the row too.
template <class Key>
Bracket<Key> bracket(const Key* bits, int64_t columns, Keys<Key> order, int64_t k, Key* keys,
                     Key* scratch) {
  Bracket<Key> b;
  if (columns < kLeastSampled) {
    b.from = make_keys(bits, columns, order, b.low, b.high, keys).first;
    return b;
  }
  const int64_t size = std::clamp<int64_t>(columns / 32, 64, 1024);
  for (int64_t i = 0; i < size; ++i) scratch[i] = order.of(bits[i * columns / size]);
  const double share = static_cast<double>(k) / columns, rank = share * size;
  const double slack = 2.5 * std::sqrt(rank * (1 - share)) + 1.5;
  const auto low_rank = static_cast<int64_t>(rank + slack);
  const auto high_rank = static_cast<int64_t>(std::floor(rank - slack));
  Key low = b.low, high = b.high;
  int64_t end = size;
  if (low_rank < size) {
    std::nth_element(scratch, scratch + low_rank, scratch + size, std::greater<Key>());
    low = scratch[low_rank];
    end = low_rank + 1;
  }
  if (high_rank >= 0) {
    std::nth_element(scratch, scratch + high_rank, scratch + end, std::greater<Key>());
    high = scratch[high_rank];
  }
  const auto [from, above] = make_keys(bits, columns, order, low, high, keys);
  if (above >= k) {
    b.low = high + 1;
    b.from = above;
  } else if (from >= k) {
    b = {low, high, above, from};
  } else {
    b.high = low - 1;
    b.above = from;
  }
  return b;
}

// 1 <= k < columns. Writes the keys of the row too.
template <class Key>
Threshold<Key> threshold(const Key* bits, int64_t columns, Keys<Key> order, int64_t k, Key* keys,
                         Key* scratch) {
  const Bracket<Key> b = bracket(bits, columns, order, k, keys, scratch);
  const int64_t rank = k - b.above;
  if (b.low == b.high) return {b.low, rank, b.from == k};
  const int64_t size = collect(keys, columns, b.low, b.high, scratch);
  std::nth_element(scratch, scratch + rank - 1, scratch + size, std::greater<Key>());
  const Key key = scratch[rank - 1];
  const int64_t ties = std::count(scratch, scratch + rank, key);
  return {key, ties, std::find(scratch + rank, scratch + size, key) == scratch + size};
}

template <class Key, class Index>
void write_indices(const Key* keys, int64_t columns, Threshold<Key> t, int64_t k, Index* out) {
  int64_t size = 0, i = 0;
  const auto keeps = [&](Key key) {
    const bool tie = key == t.key && t.ties > 0;
    t.ties -= tie;
    return key > t.key || tie;
  };
  constexpr Key kMost = std::numeric_limits<Key>::max();
  for (; i + kBlock <= columns && size + kBlock <= k; i += kBlock)
    if (any_in(keys + i, t.key, kMost))
      for (int64_t j = i; j < i + kBlock; ++j) {
        out[size] = static_cast<Index>(j);
        size += keeps(keys[j]);
      }
  for (; size < k; i += kBlock)  // some may be missing at the end, so writes go with care
    if (i + kBlock > columns || any_in(keys + i, t.key, kMost))
      for (int64_t j = i; j < std::min(columns, i + kBlock); ++j)
        if (keeps(keys[j])) out[size++] = static_cast<Index>(j);
}

template <class Key>
void write_sparse(const Key* bits, const Key* keys, int64_t columns, Threshold<Key> t, Key* out) {
  int64_t i = 0;
  for (; i + VectorOf<Key>::kLanes <= columns; i += VectorOf<Key>::kLanes) {
    const Vector<Key> v = load(bits + i) & ~(load(keys + i) < t.key);
    std::memcpy(out + i, &v, kBytes);
  }
  for (; i < columns; ++i) out[i] = keys[i] >= t.key ? bits[i] : Key{0};
  if (t.all_ties) return;
  for (i = 0; i < columns; ++i)
    if (keys[i] == t.key && t.ties-- <= 0) out[i] = 0;
}

// row(i, bits, keys, scratch) for each row, the last two with room for as many. Bits that do not
// follow each other, or stand on an odd address, are copied.
template <class Key, class Row>
void for_rows(const FloatRows& x, const Row& row) {
  const int64_t columns = x.columns, step = std::max<int64_t>(1, kTaskWork / columns);
  constexpr int64_t kSize = sizeof(Key);
  const bool plain =
      x.column_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % alignof(Key) == 0;
  const auto task = [&](int64_t t) {
    Scratch<Key> memory((plain ? 2 : 3) * columns);
    Key *const keys = memory.get(), *const scratch = keys + columns;
    for (int64_t i = t * step; i < std::min(x.rows, (t + 1) * step); ++i) {
      const char* from = static_cast<const char*>(x.data) + i * x.row_stride * kSize;
      const Key* bits = scratch + columns;
      if (plain) bits = reinterpret_cast<const Key*>(from);
      else
        for (int64_t j = 0; j < columns; ++j)
          std::memcpy(scratch + columns + j, from + j * x.column_stride * kSize, kSize);
      row(i, bits, keys, scratch);
    }
  };
  parallel_for_if(x.rows * columns > kSerialWork, ceil_div(x.rows, step), task);
}

// f(Keys) for the integers that are as wide as the numbers.
template <class F>
void with_keys(DType dtype, bool absolute, const F& f) {
  switch (dtype) {
    case DType::f64: return f(Keys<int64_t>{0x7ff0000000000000, absolute});
    case DType::f32: return f(Keys<int32_t>{0x7f800000, absolute});
    case DType::bf16: return f(Keys<int16_t>{0x7f80, absolute});
    default: return f(Keys<int16_t>{0x7c00, absolute});
  }
}

template <class Key, class Index>
void select_rows(const FloatRows& x, Keys<Key> order, int64_t k, Index* indices, Key* values) {
  for_rows<Key>(x, [&](int64_t i, const Key* bits, Key* keys, Key* scratch) {
    Index* kept = indices + i * k;
    if (k == x.columns)
      for (int64_t j = 0; j < k; ++j) kept[j] = static_cast<Index>(j);
    else {
      const Threshold<Key> t = threshold(bits, x.columns, order, k, keys, scratch);
      write_indices(keys, x.columns, t, k, kept);
    }
    if (values)
      for (int64_t j = 0; j < k; ++j) values[i * k + j] = bits[kept[j]];
  });
}

}  // namespace

void select_topk(const FloatRows& x, int64_t k, bool absolute, void* indices, DType index_dtype,
                 void* values) {
  if (k == 0 || x.rows == 0) return;
  with_keys(x.dtype, absolute, [&](auto order) {
    using Key = decltype(order.infinity);
    Key* out = static_cast<Key*>(values);
    if (index_dtype == DType::i32) select_rows(x, order, k, static_cast<int32_t*>(indices), out);
    else select_rows(x, order, k, static_cast<int64_t*>(indices), out);
  });
}

void sparsify_topk(const FloatRows& x, int64_t k, bool absolute, void* out) {
  if (x.rows == 0 || x.columns == 0) return;
  with_keys(x.dtype, absolute, [&](auto order) {
    using Key = decltype(order.infinity);
    for_rows<Key>(x, [&](int64_t i, const Key* bits, Key* keys, Key* scratch) {
      Key* row = static_cast<Key*>(out) + i * x.columns;
      if (k == 0) std::fill_n(row, x.columns, Key{0});
      else if (k == x.columns) std::copy_n(bits, x.columns, row);
      else {
        const Threshold<Key> t = threshold(bits, x.columns, order, k, keys, scratch);
        write_sparse(bits, keys, x.columns, t, row);
      }
    });
  });
}

}  // namespace pentad::sparse
