// SPDX-License-Identifier: Apache-2.0
// The definition of the search over codes: every cost, in order.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "pq/code_scan.h"

namespace pentad::pq::reference {

// codes (n, M) by rows, table (used, K) -> cost of each row.
std::vector<float> costs(const std::vector<uint8_t>& codes, int64_t subspaces, const float* table,
                         int64_t used, int64_t entries, float offset, const float* scale,
                         const float* bias);
// (cost, id) of the allowed rows, best first: the whole list is sorted.
std::vector<std::pair<float, int64_t>> ranking(const std::vector<float>& costs, const uint8_t* mask,
                                               const int64_t* ids);

}  // namespace pentad::pq::reference
