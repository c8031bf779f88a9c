// SPDX-License-Identifier: Apache-2.0
#include "hamming/hamming_drive.h"

#include "common/isa.h"

namespace pentad::hamming {

const Kernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::hamming_kernels;
    case Isa::v4: return v4::hamming_kernels;
    case Isa::v3: return v3::hamming_kernels;
    default: return v2::hamming_kernels;
#else
    default: return neon::hamming_kernels;
#endif
  }
}

std::vector<uint32_t> live_bits(const uint8_t* mask, int64_t rows) {
  std::vector<uint32_t> live;
  if (!mask) return live;
  live.resize(ceil_div(rows, kBlockRows));
  for (int64_t b = 0; b < static_cast<int64_t>(live.size()); ++b) {
    const int64_t n = std::min(kBlockRows, rows - b * kBlockRows);
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; ++i)
      bits |= static_cast<uint32_t>(mask[b * kBlockRows + i] != 0) << i;
    live[b] = bits;
  }
  return live;
}

void merge(HitBuffer& into, const HitBuffer& from) {
  for (int64_t i = 0; i < from.size; ++i) {
    if (from.items[i].key >= into.limit) continue;
    if (into.size == into.capacity) make_room(into);
    into.items[into.size++] = from.items[i];
  }
}

}  // namespace pentad::hamming
