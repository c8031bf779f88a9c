// SPDX-License-Identifier: Apache-2.0
#include "common/scratch.h"

#include <new>
#include <vector>

#include "common/aligned.h"

namespace pentad {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

struct Kept {
  std::vector<Block> blocks;
  size_t bytes = 0;

  ~Kept() {
    for (const Block& block : blocks) aligned_free(block.data);
  }
};

thread_local Kept kept;

}  // namespace

ScratchBytes::ScratchBytes(size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  if (bytes == 0) bytes = 4096;
  // The smallest that fits, unless it is far too large.
  size_t best = kept.blocks.size();
  for (size_t i = 0; i < kept.blocks.size(); ++i)
    if (kept.blocks[i].bytes >= bytes && kept.blocks[i].bytes <= 4 * bytes &&
        (best == kept.blocks.size() || kept.blocks[i].bytes < kept.blocks[best].bytes))
      best = i;
  if (best < kept.blocks.size()) {
    data_ = kept.blocks[best].data;
    bytes_ = kept.blocks[best].bytes;
    kept.bytes -= bytes_;
    kept.blocks[best] = kept.blocks.back();
    kept.blocks.pop_back();
    return;
  }
  data_ = aligned_allocate(bytes);
  bytes_ = bytes;
}

ScratchBytes::~ScratchBytes() {
  if (!data_) return;
  if (bytes_ > kMostKept) {
    aligned_free(data_);
    return;
  }
  // What was used last is kept; what lay longest makes room.
  size_t drop = 0;
  while (drop < kept.blocks.size() && kept.bytes + bytes_ > kMostKept) {
    kept.bytes -= kept.blocks[drop].bytes;
    aligned_free(kept.blocks[drop++].data);
  }
  kept.blocks.erase(kept.blocks.begin(), kept.blocks.begin() + static_cast<ptrdiff_t>(drop));
  try {
    kept.blocks.push_back({data_, bytes_});
    kept.bytes += bytes_;
  } catch (const std::bad_alloc&) {
    aligned_free(data_);
  }
}

}  // namespace pentad
