// SPDX-License-Identifier: Apache-2.0
// Exact search of sparse documents in a CUDA device's memory, by inverted lists over windows of
// kWindowRows documents: what search.h does, with lists of exact values and no bounds.
//
//   window w has the lists [windows[w], windows[w + 1]), of the terms list_terms, rising;
//   list i the postings [starts[i], starts[i + 1]): a document of the window, rising, and its value.
//
// Scores, order and ties are those of search.h: a double sum over rising terms, rounded to float32
// (-0 becomes 0); the largest first, equal ones by document; all documents are candidates. Contents
// are not trusted: what they say stays within the arrays.
#pragma once
#include "common/cuda_stream.h"
#include "sparse/csr.h"

namespace pentad::sparse::cuda {

constexpr int64_t kWindowRows = 8192;
constexpr int64_t kMostHits = 2048;                      // k, as lists of hits lie in shared memory
constexpr int64_t kMostDocuments = int64_t{0xffffffff};  // 32 bits of a hit, and one is "none"

struct Inverted {
  int64_t documents, lists, entries;
  const int64_t* windows;     // (windows + 1)
  const int32_t* list_terms;  // (lists)
  const int64_t* starts;      // (lists + 1)
  const int16_t* places;      // (entries)
  const float* values;        // (entries)
  const uint8_t* mask;        // (documents), what may be returned, or null
};

// scores, ids (queries.rows, k), -inf and -1 where there are fewer; k at most kMostHits.
int64_t search_scratch(int64_t queries, int64_t documents, int64_t k);
void search(const CudaStream& stream, const Inverted& docs, const Rows<float>& queries, int64_t k,
            float* scores, int64_t* ids, void* scratch);

}  // namespace pentad::sparse::cuda
