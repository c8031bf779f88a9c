// SPDX-License-Identifier: Apache-2.0
#include "pq/code_scan_reference.h"

#include <algorithm>

namespace pentad::pq::reference {

std::vector<float> costs(const std::vector<uint8_t>& codes, int64_t subspaces, const float* table,
                         int64_t used, int64_t entries, float offset, const float* scale,
                         const float* bias) {
  std::vector<float> out(codes.size() / subspaces);
  for (size_t i = 0; i < out.size(); ++i) {
    float sum = offset;
    for (int64_t m = 0; m < used; ++m) sum += table[m * entries + codes[i * subspaces + m]];
    if (scale) sum = bias[i] + scale[i] * sum;
    out[i] = sum + 0.0f;
  }
  return out;
}

std::vector<std::pair<float, int64_t>> ranking(const std::vector<float>& costs, const uint8_t* mask,
                                               const int64_t* ids) {
  std::vector<std::pair<float, int64_t>> rows;
  for (size_t i = 0; i < costs.size(); ++i)
    if (!mask || mask[i]) rows.emplace_back(costs[i], ids ? ids[i] : static_cast<int64_t>(i));
  std::sort(rows.begin(), rows.end());
  return rows;
}

}  // namespace pentad::pq::reference
