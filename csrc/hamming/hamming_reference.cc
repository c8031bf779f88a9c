// SPDX-License-Identifier: Apache-2.0
#include "hamming/hamming_reference.h"

#include <algorithm>

namespace pentad::hamming::reference {

int bit(const Code& code, int64_t j) { return code[j / 8] >> (7 - j % 8) & 1; }

Code pack(const std::vector<double>& x, double threshold) {
  Code code((x.size() + 7) / 8, 0);
  for (size_t j = 0; j < x.size(); ++j)
    if (x[j] > threshold) code[j / 8] |= 128 >> j % 8;
  return code;
}

double distance(const Code& a, const Code& b, Metric metric) {
  int differ = 0, both = 0, any = 0;
  for (int64_t j = 0; j < static_cast<int64_t>(a.size()) * 8; ++j) {
    differ += bit(a, j) != bit(b, j);
    both += bit(a, j) && bit(b, j);
    any += bit(a, j) || bit(b, j);
  }
  switch (metric) {
    case Metric::hamming: return differ;
    case Metric::intersection: return both;
    default: return any ? static_cast<float>(any - both) / static_cast<float>(any) : 0.0f;
  }
}

double score(const std::vector<double>& x, const Code& code) {
  double sum = 0;
  for (size_t j = 0; j < x.size(); ++j) sum += bit(code, j) ? x[j] : -x[j];
  return sum;
}

std::vector<double> weighted_sum(const std::vector<double>& weights, const std::vector<Code>& codes,
                                 int64_t dim) {
  std::vector<double> sum(dim, 0.0);
  for (size_t i = 0; i < codes.size(); ++i)
    for (int64_t j = 0; j < dim; ++j) sum[j] += bit(codes[i], j) ? weights[i] : -weights[i];
  return sum;
}

Code permute(const Code& code, int64_t dim, int64_t shift) {
  Code out(code.size(), 0);
  for (int64_t j = 0; j < dim; ++j) {
    const int64_t to = ((j + shift) % dim + dim) % dim;
    if (bit(code, j)) out[to / 8] |= 128 >> to % 8;
  }
  return out;
}

std::vector<std::pair<double, int64_t>> topk(const Code& query, const std::vector<Code>& codes,
                                             int64_t k, Metric metric) {
  const double sign = metric == Metric::intersection ? -1 : 1;
  std::vector<std::pair<double, int64_t>> all;
  for (size_t i = 0; i < codes.size(); ++i)
    all.emplace_back(sign * distance(query, codes[i], metric), i);
  std::sort(all.begin(), all.end());
  all.resize(std::min<size_t>(all.size(), k));
  for (auto& [value, id] : all) value *= sign;
  return all;
}

}  // namespace pentad::hamming::reference
