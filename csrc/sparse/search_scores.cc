// SPDX-License-Identifier: Apache-2.0
// Scores of listed documents, and the kernels of the level in use.
#include <limits>

#include "common/isa.h"
#include "common/parallel.h"
#include "sparse/query_weights.h"
#include "sparse/search.h"

namespace pentad::sparse {

const SearchKernels& search_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::sparse_search_kernels;
    case Isa::v4: return v4::sparse_search_kernels;
    case Isa::v3: return v3::sparse_search_kernels;
    default: return v2::sparse_search_kernels;
#else
    default: return neon::sparse_search_kernels;
#endif
  }
}

void scores_at(const Forward& forward, const SparseQueries& queries, const int64_t* candidates,
               int64_t c, float* scores) {
  parallel_for_if(queries.count * c >= 512, queries.count, [&](int64_t q) {
    const int64_t begin = queries.indptr[q];
    Weights weights;
    weights.set(queries.terms + begin, queries.weights + begin, queries.indptr[q + 1] - begin);
    for (int64_t i = q * c; i < (q + 1) * c; ++i) {
      const int64_t document = candidates[i];
      const bool known = document >= 0 && document < forward.documents;
      scores[i] =
          known ? weights.score(forward, document) : -std::numeric_limits<float>::infinity();
    }
  });
}

}  // namespace pentad::sparse
