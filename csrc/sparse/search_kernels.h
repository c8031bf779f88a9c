// SPDX-License-Identifier: Apache-2.0
// The inner kernels of the search in inverted lists that exist once per instruction-set level
// (search_simd.inc). search.cc drives them. `sums` uint16 (blocks * 64), a document each; W is the
// weight of a term, and a posting b adds (b * W) >> 8.
#pragma once
#include <stdint.h>

namespace pentad::sparse {

struct SearchKernels {
  // sums[d] = what the rows of `count` terms (postings.h) give; overwrites.
  void (*add_rows)(const uint8_t* const* rows, const uint16_t* weights, int64_t count,
                   int64_t blocks, uint16_t* sums);
  // sums[documents[i]] += (values[i] * weight) >> 8, documents distinct.
  void (*add_list)(const uint16_t* documents, const uint8_t* values, int64_t count, uint16_t weight,
                   uint16_t* sums);
  // sums[d] = 0 where mask[d] is 0, d < documents.
  void (*clear)(const uint8_t* mask, int64_t documents, uint16_t* sums);
  // The largest sums of `groups` groups of `depth` documents each, so that no document is in two:
  // group 32 i + j are the documents 32 (depth i + n) + j, n < depth. `groups` divides by 32.
  void (*group_most)(const uint16_t* sums, int64_t groups, int64_t depth, uint16_t* most);
  // How many sums are at least `least`.
  int64_t (*count_from)(const uint16_t* sums, int64_t blocks, uint16_t least);
  // Their documents, rising; returns how many.
  int64_t (*find_from)(const uint16_t* sums, int64_t blocks, uint16_t least, uint16_t* documents);
  // The positions of the `count` terms whose bit (filter_bit) of the 1,024 is set, rising; returns
  // how many. `found` has room for 16 more.
  int64_t (*pass_filter)(const int32_t* terms, int64_t count, const uint32_t* filter,
                         uint16_t* found);
};

constexpr int kFilterWords = 32;
constexpr uint32_t kHash = 2654435761u;  // 2^32 over the golden ratio
inline uint32_t filter_bit(int32_t term) { return static_cast<uint32_t>(term) * kHash >> 22; }

}  // namespace pentad::sparse

// One table per level that is compiled in.
namespace pentad::v2 {
extern const sparse::SearchKernels sparse_search_kernels;
}
namespace pentad::v3 {
extern const sparse::SearchKernels sparse_search_kernels;
}
namespace pentad::v4 {
extern const sparse::SearchKernels sparse_search_kernels;
}
namespace pentad::v4x {
extern const sparse::SearchKernels sparse_search_kernels;
}
namespace pentad::neon {
extern const sparse::SearchKernels sparse_search_kernels;
}
