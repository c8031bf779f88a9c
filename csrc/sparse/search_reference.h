// SPDX-License-Identifier: Apache-2.0
// The definition of search.h in plain loops.
#pragma once
#include "sparse/search.h"

namespace pentad::sparse {

float score_reference(const Forward&, int64_t document, const SparseQueries&, int64_t query);
void topk_reference(const Documents&, const SparseQueries&, int64_t k, float* scores,
                    int64_t* documents);

}  // namespace pentad::sparse
