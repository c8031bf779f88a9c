// SPDX-License-Identifier: Apache-2.0
#include "sparse/search_reference.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace pentad::sparse {

float score_reference(const Forward& forward, int64_t document, const SparseQueries& queries,
                      int64_t query) {
  const Span row = row_of(forward, document);
  double sum = 0;
  int64_t a = queries.indptr[query], b = row.begin;
  while (a < queries.indptr[query + 1] && b < row.end) {
    if (queries.terms[a] == forward.terms[b])
      sum += static_cast<double>(queries.weights[a]) * value_of(forward, document, b);
    const bool next_query = queries.terms[a] <= forward.terms[b];
    const bool next_document = queries.terms[a] >= forward.terms[b];
    a += next_query, b += next_document;
  }
  return static_cast<float>(sum) + 0.0f;
}

void topk_reference(const Documents& documents, const SparseQueries& queries, int64_t k,
                    float* scores, int64_t* found) {
  for (int64_t q = 0; q < queries.count; ++q) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t i = 0; i < documents.forward.documents; ++i)
      if (!documents.mask || documents.mask[i])
        all.push_back({-score_reference(documents.forward, i, queries, q), i});
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < k; ++i) {
      const bool present = i < static_cast<int64_t>(all.size());
      scores[q * k + i] = present ? -all[i].first + 0.0f : -std::numeric_limits<float>::infinity();
      found[q * k + i] = present ? all[i].second : -1;
    }
  }
}

}  // namespace pentad::sparse
