// SPDX-License-Identifier: Apache-2.0
// Two passes over the rows: sizes and largest values by term, then the postings, which come in the
// order of the documents. Terms are numbered by a table where they are below 2^22, else by sorting.
// 65,536 documents of 120 terms, one thread: see bench/cpp/sparse.cc.
#include "sparse/postings.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

#include "common/reals.h"

namespace pentad::sparse {
namespace {

constexpr int32_t kMostTable = 1 << 22;

// The number of a term among those of a window.
class Numbering {
 public:
  explicit Numbering(const std::vector<int32_t>& terms) : terms_(terms) {
    if (terms.empty() || terms.back() >= kMostTable) return;
    table_.assign(terms.back() + 1, 0);
    for (size_t i = 0; i < terms.size(); ++i) table_[terms[i]] = static_cast<int32_t>(i);
  }
  // -1 for a term that is not among them: the arrays may change meanwhile.
  int64_t operator()(int32_t term) const {
    if (term < 0 || terms_.empty() || term > terms_.back()) return -1;
    const int64_t place =
        table_.empty() ? std::lower_bound(terms_.begin(), terms_.end(), term) - terms_.begin()
                       : table_[term];
    return terms_[place] == term ? place : -1;
  }

 private:
  const std::vector<int32_t>& terms_;
  std::vector<int32_t> table_;
};

std::vector<int32_t> distinct_terms(const Forward& forward, int64_t first, int64_t last) {
  std::vector<int32_t> all;
  for (int64_t i = first; i < last; ++i) {
    const Span row = row_of(forward, i);
    std::copy_if(forward.terms + row.begin, forward.terms + row.end, std::back_inserter(all),
                 [](int32_t term) { return term >= 0; });
  }
  const int32_t most = all.empty() ? 0 : *std::max_element(all.begin(), all.end());
  if (most < kMostTable) {
    std::vector<uint8_t> seen(most + 1);
    for (int32_t term : all) seen[term] = 1;
    all.clear();
    for (int32_t term = 0; term <= most; ++term)
      if (seen[term]) all.push_back(term);
    return all;
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

bool is_row(int64_t count, int64_t documents) { return count * kRowShare >= row_bytes(documents); }

int64_t list_bytes(int64_t count) { return (4 + 3 * count + 3) / 4 * 4; }

// The least float whose 255-fold is at least `most`, or a little above.
float scale_for(float most) {
  float scale = most / 255;
  while (static_cast<double>(scale) * 255 < most)
    scale = std::nextafterf(scale, std::numeric_limits<float>::infinity());
  return scale;
}

// The least byte b with value <= scale * b, which is exact in double.
uint8_t byte_for(float value, float scale) {
  if (!(scale > 0) || !(value > 0)) return 1;
  const double wide = scale;
  auto b = static_cast<int>(std::min(255.0, std::ceil(value / wide)));  // 255 for NaN
  while (b < 255 && wide * b < value) ++b;
  return static_cast<uint8_t>(std::max(b, 1));
}

// Of document d within its block of 64.
int64_t place_in_block(int64_t d) { return d % 32 / 8 * 16 + d / 32 * 8 + d % 8; }

}  // namespace

float value_of(const Forward& forward, int64_t document, int64_t j) {
  if (forward.dtype == DType::f32) return static_cast<const float*>(forward.values)[j];
  if (forward.dtype == DType::u8)
    return forward.scale[document] * static_cast<const uint8_t*>(forward.values)[j];
  return finite_half(static_cast<const uint16_t*>(forward.values)[j]);
}

Postings postings_of(const Window& window, int64_t place) {
  const int64_t begin = window.starts[place], end = window.starts[place + 1];
  if (begin < 0 || begin > end || end > window.bytes || begin % 4) return {};
  const uint8_t* at = window.postings + begin;
  if (end - begin == row_bytes(window.documents)) return {at, nullptr, nullptr, 0};
  if (end - begin < 4) return {};
  uint32_t count;
  std::memcpy(&count, at, 4);
  if (list_bytes(count) != end - begin) return {};
  const auto* documents = reinterpret_cast<const uint16_t*>(at + 4);
  return {nullptr, documents, at + 4 + 2 * int64_t{count}, count};
}

WindowBuilder::WindowBuilder(const Forward& forward, int64_t first, int64_t last)
    : forward_(forward),
      first_(first),
      last_(last),
      terms_(distinct_terms(forward, first, last)),
      starts_(1),
      counts_(terms_.size()),
      most_(terms_.size()) {
  const Numbering number(terms_);
  for (int64_t i = first; i < last; ++i) {
    const Span row = row_of(forward, i);
    for (int64_t j = row.begin; j < row.end; ++j) {
      const int64_t place = number(forward.terms[j]);
      if (place < 0) continue;
      ++counts_[place];
      most_[place] = std::max(most_[place], value_of(forward, i, j));
    }
  }
  for (int64_t count : counts_) {
    const bool row = is_row(count, last - first);
    starts_.push_back(starts_.back() + (row ? row_bytes(last - first) : list_bytes(count)));
  }
}

void WindowBuilder::write(int32_t* terms, int64_t* starts, float* scales, uint8_t* postings) const {
  std::copy(terms_.begin(), terms_.end(), terms);
  std::copy(starts_.begin(), starts_.end(), starts);
  std::transform(most_.begin(), most_.end(), scales, scale_for);
  std::memset(postings, 0, bytes());
  for (int64_t place = 0; place < count(); ++place) {
    if (is_row(counts_[place], last_ - first_)) continue;
    const auto n = static_cast<uint32_t>(counts_[place]);
    std::memcpy(postings + starts_[place], &n, 4);
  }
  const Numbering number(terms_);
  std::vector<int64_t> next(terms_.size());
  for (int64_t i = first_; i < last_; ++i) {
    const Span row = row_of(forward_, i);
    const auto d = static_cast<uint16_t>(i - first_);
    for (int64_t j = row.begin; j < row.end; ++j) {
      const int64_t place = number(forward_.terms[j]);
      if (place < 0) continue;
      const int64_t count = counts_[place];
      const uint8_t b = byte_for(value_of(forward_, i, j), scales[place]);
      uint8_t* at = postings + starts_[place];
      if (is_row(count, last_ - first_)) {
        at[d / kRowBlock * kRowBlock + place_in_block(d % kRowBlock)] = b;
      } else if (next[place] < count) {
        std::memcpy(at + 4 + 2 * next[place], &d, 2);
        at[4 + 2 * count + next[place]++] = b;
      }
    }
  }
}

const char* defect_of(const Window& window) {
  if (window.documents < 0 || window.documents > kWindow) return "more documents than a window has";
  if (window.count == 0) return window.starts[0] == 0 && window.bytes == 0 ? nullptr : "no terms";
  if (window.starts[0] != 0 || window.starts[window.count] != window.bytes)
    return "its postings do not begin and end where the terms say";
  for (int64_t t = 0; t < window.count; ++t) {
    if (window.terms[t] < 0 || (t && window.terms[t] <= window.terms[t - 1]))
      return "its terms do not rise";
    if (!(window.scales[t] >= 0) || !std::isfinite(window.scales[t])) return "a scale is no number";
    if (window.starts[t] > window.starts[t + 1]) return "its postings do not rise";
    const Postings postings = postings_of(window, t);
    if (postings.row) continue;
    if (!postings.documents) return "the postings of a term have another size than they say";
    for (int64_t i = 0; i < postings.count; ++i)
      if (postings.documents[i] >= window.documents ||
          (i && postings.documents[i] <= postings.documents[i - 1]))
        return "the documents of a term do not rise";
  }
  return nullptr;
}

}  // namespace pentad::sparse
