// SPDX-License-Identifier: Apache-2.0
// The definition of every operation: plain loops over bits, double accumulators. The fast kernels
// are held to these, and these alone; read them first.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "hamming/hamming.h"

namespace pentad::hamming::reference {

using Code = std::vector<uint8_t>;

Code pack(const std::vector<double>& x, double threshold);
int bit(const Code& code, int64_t j);  // 0 or 1
double distance(const Code& a, const Code& b, Metric metric);
double score(const std::vector<double>& x, const Code& code);
std::vector<double> weighted_sum(const std::vector<double>& weights, const std::vector<Code>& codes,
                                 int64_t dim);
Code permute(const Code& code, int64_t dim, int64_t shift);
// (value, id), best first: the whole list is sorted.
std::vector<std::pair<double, int64_t>> topk(const Code& query, const std::vector<Code>& codes,
                                             int64_t k, Metric metric);

}  // namespace pentad::hamming::reference
