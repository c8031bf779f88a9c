// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <memory>
#include <new>

namespace pentad {

// Memory on a cache-line boundary; throws std::bad_alloc.
inline void* aligned_allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }
inline void aligned_free(void* p) { ::operator delete(p, std::align_val_t{64}); }

struct Free {
  void operator()(void* p) const { aligned_free(p); }
};
template <class T>
using AlignedBuffer = std::unique_ptr<T[], Free>;

// Uninitialised scratch of `count` elements on a cache-line boundary; throws std::bad_alloc.
template <class T>
AlignedBuffer<T> aligned_buffer(size_t count) {
  return AlignedBuffer<T>(static_cast<T*>(aligned_allocate(count * sizeof(T))));
}

}  // namespace pentad
