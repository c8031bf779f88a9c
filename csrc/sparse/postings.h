// SPDX-License-Identifier: Apache-2.0
// Sparse documents by rows, and inverted lists over windows of them.
//
// A window holds the lists of up to 65,536 documents, so that a document is a 16-bit number in it,
// and the sums of one query fit the second cache. A value v >= 0 of term t becomes a byte b with
// v <= scale_t * b, 1 <= b <= 255: an upper bound, as the search needs it. Per term:
//
//   list    uint32 n, uint16 document[n] rising, uint8 b[n], padding to four bytes;
//   row     uint8 b[documents, padded to blocks of 64], 0 where the term is absent.
//
// A term is a row where one document in 16 has it, so that a sum takes as long either way (64
// bytes of a row 4 to 5 cycles, a posting 2 to 3.4) or less. Which it is, its size tells: a row has
// as many bytes as padded documents, a list less.
//
// Bytes of a posting: 3 in a list, 1 to 16 in a row; 4.1 over 120 terms of a Zipf law.
//
// In a block of 64 bytes of a row, byte 16 i + j is document 8 i + j for j < 8 and 32 + 8 i + (j -
// 8) otherwise (i < 4), so that an unpacking of bytes into the upper halves of 16-bit lanes, which
// works within 16 bytes, leaves the documents in order at every vector width.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace pentad::sparse {

constexpr int64_t kWindow = 65536;
constexpr int64_t kRowBlock = 64;
constexpr int64_t kRowShare = 16;  // of the documents: from one in so many a term is a row

// Documents by rows: those of document i are the entries [indptr[i], indptr[i + 1]), terms rising.
// A value is values[j], f32 or f16, or for u8 the float32 product scale[i] * values[j].
struct Forward {
  const int64_t* indptr = nullptr;  // (documents + 1)
  const int32_t* terms = nullptr;   // (entries)
  const void* values = nullptr;     // (entries)
  DType dtype = DType::f32;
  const float* scale = nullptr;  // (documents), with u8
  int64_t documents = 0, entries = 0;
};

// Places of a row, empty where indptr does not lead into the entries: what it says is not trusted.
struct Span {
  int64_t begin, end;
};
inline Span row_of(const Forward& forward, int64_t document) {
  const int64_t begin = forward.indptr[document], end = forward.indptr[document + 1];
  if (begin < 0 || begin > end || end > forward.entries) return {0, 0};
  return {begin, end};
}

// Entry j of a document, in float32.
float value_of(const Forward&, int64_t document, int64_t j);

struct Window {
  const int32_t* terms = nullptr;   // (count), rising
  const int64_t* starts = nullptr;  // (count + 1) into postings, multiples of 4
  const float* scales = nullptr;    // (count)
  const uint8_t* postings = nullptr;
  int64_t count = 0, bytes = 0;
  int64_t documents = 0;  // up to kWindow
};

inline int64_t row_bytes(int64_t documents) {
  return (documents + kRowBlock - 1) / kRowBlock * kRowBlock;
}

// What stands for a term of a window: a row, or a list; nothing where the arrays do not fit.
struct Postings {
  const uint8_t* row = nullptr;
  const uint16_t* documents = nullptr;
  const uint8_t* values = nullptr;
  int64_t count = 0;  // of a list
};
Postings postings_of(const Window&, int64_t place);
// Ahead of it.
inline __attribute__((always_inline)) void prefetch_postings(const Window& window, int64_t place) {
  __builtin_prefetch(window.postings + window.starts[place]);
}

// The lists of the documents [first, last), of which the values are finite and not negative.
class WindowBuilder {
 public:
  WindowBuilder(const Forward&, int64_t first, int64_t last);

  int64_t count() const { return static_cast<int64_t>(terms_.size()); }
  int64_t bytes() const { return starts_.back(); }
  void write(int32_t* terms, int64_t* starts, float* scales, uint8_t* postings) const;

 private:
  const Forward forward_;
  const int64_t first_, last_;
  std::vector<int32_t> terms_;
  std::vector<int64_t> starts_, counts_;
  std::vector<float> most_;
};

// Why the arrays are no window of so many documents; null where they are one.
const char* defect_of(const Window&);

}  // namespace pentad::sparse
