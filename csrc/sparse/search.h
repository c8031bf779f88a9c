// SPDX-License-Identifier: Apache-2.0
// The k documents of largest inner product with sparse queries.
//
//   score(q, i) = sum over the common terms, rising, of (double) q_t * (double) v_it
//
// rounded to float32 (-0 becomes 0). Largest first, ties to the smaller document; documents without
// a common term score 0 and are ranked like the others.
//
// A window (postings.h) is searched in two steps. Bounds: with a unit u so that nothing overflows,
// a term of weight q adds (b * W) >> 8, W = ceil(256 u q scale_t), to a 16-bit sum for each
// document b of its list, so that score <= (sum + terms) / u. Terms of negative weight add nothing.
// Scores: documents whose bound reaches the k-th best score so far, some tenths of a per cent more
// than k, are scored by their rows. The result is therefore that of brute force.
//
// What limits it: rows of frequent terms, 64 documents in 4 to 5 cycles or 64 bytes from memory,
// whichever is slower; lists of the others, 2 to 3.4 cycles a posting; of a large k, the scores,
// 500 cycles and a cache miss or two each.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"
#include "sparse/postings.h"

namespace pentad::sparse {

// Documents in windows of kWindow each, but for the last.
struct Documents {
  Forward forward;
  std::vector<Window> windows;
  const uint8_t* mask = nullptr;  // (documents), nonzero: may be returned; null: all may
};

// Rows of query terms: entries [indptr[q], indptr[q + 1]), terms rising, weights finite.
struct SparseQueries {
  const int64_t* indptr = nullptr;
  const int32_t* terms = nullptr;
  const float* weights = nullptr;
  int64_t count = 0;
};

// What a search may leave out; the defaults leave nothing out that could be returned. The scores
// that it returns are exact in any case. Bounds are then sums over the terms that are looked up.
struct Pruning {
  int64_t query_cut = 0;  // terms of a query, those that may add most, that are looked up; 0: all
  double block_factor =
      0;             // the postings of a term in a window are passed over where the most that
                     // they add is below this share of the k-th best bound so far
  double alpha = 1;  // documents are scored whose bound is at least this share of the k-th
                     // best bound; less finds no fewer of the best, in more time
};

// scores and documents (queries.count, k), contiguous; -inf and -1 where fewer than k exist.
void topk(const Documents&, const SparseQueries&, int64_t k, const Pruning&, float* scores,
          int64_t* documents);

// candidates and scores (queries.count, c): -inf where the candidate is -1 or no document.
void scores_at(const Forward&, const SparseQueries&, const int64_t* candidates, int64_t c,
               float* scores);

}  // namespace pentad::sparse
