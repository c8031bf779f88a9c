// SPDX-License-Identifier: Apache-2.0
// What the drivers make of a problem's operands: the same arrays from one of their elements on.
#pragma once
#include "common/ceil_div.h"
#include "scan/scan.h"

namespace pentad::scan {

inline void* moved(const Operand& x, int64_t elements) {
  return x.data ? static_cast<char*>(x.data) + elements * size_of(x.dtype) : nullptr;
}

// From element `first` on, by these strides.
inline Strided strided(const Operand& x, int64_t first, int64_t channel, int64_t time = 0) {
  if (!x.data) return {};
  return {moved(x, first), x.dtype, channel, time};
}

// (channel, place) of (b, d, p), and of (b, k, d, p) or (b, k, n, p).
inline Strided image_of(const Operand& x, int64_t b, int64_t channel) {
  const int64_t* stride = x.stride;
  return strided(x, b * stride[0] + channel * stride[1], stride[1], stride[2]);
}
inline Strided image_of(const Operand& x, int64_t b, int64_t k, int64_t channel,
                        int64_t place = 0) {
  const int64_t* stride = x.stride;
  return strided(x, b * stride[0] + k * stride[1] + channel * stride[2] + place * stride[3],
                 stride[2], stride[3]);
}

// A sequence: where its first step in scan order lies.
struct Sequence {
  int64_t batch, first, steps, chunk;  // chunk: its first among the stored ones
};
// Sequence s of a problem whose states are stored before every `chunk`-th step (stored_chunks).
template <class Problem>
Sequence sequence(const Problem& p, int64_t s, int64_t chunk) {
  Sequence q = {s, 0, p.length, s * ceil_div(p.length, chunk)};
  if (!p.begin.empty()) q = {0, p.begin[s], p.begin[s + 1] - p.begin[s], p.begin[s] / chunk + s};
  if (p.reverse) q.first += q.steps - 1;
  return q;
}

}  // namespace pentad::scan
