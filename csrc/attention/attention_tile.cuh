// SPDX-License-Identifier: Apache-2.0
// The tile program that all attention kernels share. A block owns a tile of rows (queries, or keys),
// 16 kM of them to a warp, and walks over the tiles of the other side (keys, or queries) that its
// rows may see. Scores of a warp's rows and a tile lie in registers, as attention_product.cuh says, for
// 16-bit arrays and for float32 alike, so that everything between the products is written once.
#pragma once
#include "attention/attention_cuda.h"
#include "attention/attention_product.cuh"
#include "attention/attention_scores.cuh"
#include "common/cp_async.cuh"

namespace pentad::attention::cuda {

// --- Where the sequences lie ------------------------------------------------------------------------

struct Sequence {
  int64_t q_begin = 0, k_begin = 0;  // in packed arrays
  int q_len, k_len;
};

// A tile of one sequence's queries or keys.
struct TilePlace {
  int b, first;  // first row
};

struct Sequences {
  Packed packed;
  int batch, heads, max_q, max_k;  // packed: the totals

  Sequences(const Problem& p, const Packed& packed)
      : packed(packed),
        batch(static_cast<int>(p.batch)),
        heads(static_cast<int>(p.heads)),
        max_q(static_cast<int>(p.max_q)),
        max_k(static_cast<int>(p.max_k)) {
    if (p.max_q > kMostRows || p.max_k > kMostRows || p.batch > kMostRows || p.heads > kMostRows)
      throw std::invalid_argument("attention on a device takes at most 2^30 rows");
  }

  __host__ __device__ bool is_packed() const { return packed.q.data; }
  __device__ static int boundary(const Boundaries& x, int b, int total) {
    const int64_t at = x.wide ? static_cast<const int64_t*>(x.data)[b * x.stride]
                              : static_cast<const int32_t*>(x.data)[b * x.stride];
    return static_cast<int>(max(int64_t{0}, min(at, int64_t{total})));
  }
  __device__ Sequence operator[](int b) const {
    if (!is_packed()) return {0, 0, max_q, max_k};
    const int q0 = boundary(packed.q, b, max_q), k0 = boundary(packed.k, b, max_k);
    const int q1 = boundary(packed.q, b + 1, max_q), k1 = boundary(packed.k, b + 1, max_k);
    return {q0, k0, max(q1 - q0, 0), max(k1 - k0, 0)};
  }

  // Tiles of `rows` queries or keys in all sequences, or more: nobody here knows the lengths of
  // packed ones, so sequence b gets the numbers from begin / rows + b on, which are enough.
  int64_t tiles(bool keys, int rows) const {
    const int most = keys ? max_k : max_q;
    if (!is_packed()) return int64_t{batch} * ceil_div(most, rows);
    return batch ? most / rows + int64_t{batch} : 0;
  }
  __device__ TilePlace tile(bool keys, int rows, int number) const {
    const int most = keys ? max_k : max_q;
    if (!is_packed()) {
      const int tiles = (most + rows - 1) / rows;
      return {number / tiles, number % tiles * rows};
    }
    const Boundaries& begin = keys ? packed.k : packed.q;
    int low = 0, high = batch - 1;  // the last b whose numbers begin at most at `number`
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (boundary(begin, middle, most) / rows + middle <= number) low = middle;
      else high = middle - 1;
    }
    return {low, (number - boundary(begin, low, most) / rows - low) * rows};
  }

  // Of an array of numbers per query: packed ones have no batch.
  Operand rows_of(Operand x) const {
    if (is_packed()) x.stride[0] = 0;
    return x;
  }

  // Where numbers per query, and per key of `key_heads` heads, of sequence b lie.
  __device__ int64_t row_at(const Sequence& s, int b, int h) const {
    return is_packed() ? int64_t{h} * max_q + s.q_begin : (int64_t{b} * heads + h) * max_q;
  }
  __device__ int64_t key_at(const Sequence& s, int b, int h, int key_heads) const {
    return is_packed() ? int64_t{h} * max_k + s.k_begin : (int64_t{b} * key_heads + h) * max_k;
  }
};

// --- Tiles in shared memory -------------------------------------------------------------------------

// The rows of one sequence and head.
template <class T>
struct Rows {
  T* data;
  int64_t row, column;  // strides
  bool pieces;          // rows can be copied by 16 bytes
};

// An Operand as a kernel's parameter.
struct Array {
  void* data;
  int64_t stride[4];
  bool pieces;

  Array(const Operand& x, const Packed& packed) : data(x.data) {
    const int64_t size = size_of(x.dtype);
    pieces = x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    for (int i = 0; i < 4; ++i) stride[i] = x.stride[i];
    if (packed.given()) stride[0] = 0;
    for (int i = 0; i < 3; ++i) pieces = pieces && stride[i] * size % 16 == 0;
  }
  template <class T>
  __device__ Rows<T> rows(int64_t b, int64_t h, int64_t begin) const {
    return {static_cast<T*>(data) + b * stride[0] + h * stride[1] + begin * stride[2], stride[2],
            stride[3], pieces};
  }
};

// Rows [first, first + kRows) and columns [column, column + kColumns) of x into a tile, by all lanes;
// zeros where rows end at `rows` and columns at `columns`. Ends a group of copies.
template <int kRows, int kColumns, int kLanes, class T>
__device__ void load_tile(T* tile, const Rows<T>& x, int first, int rows, int column, int columns) {
  constexpr int kPitch = pitch_of<T>(kColumns), kPiece = static_cast<int>(16 / sizeof(T));
  const int tid = static_cast<int>(threadIdx.x);
  if (x.pieces) {
    constexpr int kPieces = kColumns / kPiece;
#pragma unroll 4
    for (int n = tid; n < kRows * kPieces; n += kLanes) {
      const int r = n / kPieces, at = n % kPieces * kPiece;
      const int inside = first + r < rows ? max(0, min(kPiece, columns - column - at)) : 0;
      const T* from = inside ? x.data + int64_t{first + r} * x.row + column + at : x.data;
      cp_async(tile + r * kPitch + at, from, inside * static_cast<int>(sizeof(T)));
    }
  } else {
    for (int n = tid; n < kRows * kColumns; n += kLanes) {
      const int r = n / kColumns, at = n % kColumns;
      tile[r * kPitch + at] =
          first + r < rows && column + at < columns
              ? x.data[int64_t{first + r} * x.row + int64_t{column + at} * x.column]
              : from_float<T>(0.0f);
    }
  }
  cp_async_commit();
}

// A warp's own kRows rows of a tile, the first of which is row `first`, into x.
template <int kRows, int kColumns, class T>
__device__ void store_rows(const T* tile, int pitch, const Rows<T>& x, int first, int rows,
                           int column, int columns) {
  constexpr int kPiece = static_cast<int>(16 / sizeof(T)), kPieces = kColumns / kPiece;
  for (int n = lane_of_warp(); n < kRows * kPieces; n += 32) {
    const int r = n / kPieces, at = n % kPieces * kPiece;
    const int inside = min(kPiece, columns - column - at);
    if (first + r >= rows || inside <= 0) continue;
    T* to = x.data + int64_t{first + r} * x.row + int64_t{column + at} * x.column;
    const T* from = tile + r * pitch + at;
    if (x.pieces && inside == kPiece)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    else
      for (int i = 0; i < inside; ++i) to[i * x.column] = from[i];
  }
}

// --- The walk ---------------------------------------------------------------------------------------

// The other side's tiles of which the own rows see anything, in their order. Each lane of a warp
// looks at one of the next 32, so that a block mask's lists are read side by side.
template <bool kByKeys, int kOwn, int kOther>
class Walk {
 public:
  int first;   // row of the tile
  bool whole;  // everything in it is seen

  __device__ Walk(const HeadRules& head, int own) : head_(head), own_(own) {
    const int end = min(own + kOwn, kByKeys ? head.k_len : head.q_len) - 1;
    int begin, ignored;
    if (kByKeys) {
      head.queries_of(own, &begin, &ignored);
      head.queries_of(end, &ignored, &last_);
    } else {
      head.keys_of(own, &begin, &ignored);
      head.keys_of(end, &ignored, &last_);
    }
    next_ = begin / kOther * kOther;
  }

  // To be called by whole warps.
  __device__ bool next() {
    while (!some_) {
      if (next_ > last_) return false;
      const int at = next_ + lane_of_warp() * kOther;
      Seen seen = Seen::none;
      if (at <= last_)
        seen = kByKeys ? head_.classify(at, at + kOther, own_, own_ + kOwn)
                       : head_.classify(own_, own_ + kOwn, at, at + kOther);
      some_ = __ballot_sync(kFullWarp, seen != Seen::none);
      all_ = __ballot_sync(kFullWarp, seen == Seen::all);
      looked_at_ = next_;
      next_ += 32 * kOther;
    }
    const int n = __ffs(some_) - 1;
    some_ &= some_ - 1;
    first = looked_at_ + n * kOther;
    whole = all_ >> n & 1;
    return true;
  }

 private:
  const HeadRules& head_;
  int own_, last_, next_, looked_at_ = 0;
  uint32_t some_ = 0, all_ = 0;
};

}  // namespace pentad::attention::cuda
