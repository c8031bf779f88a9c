// SPDX-License-Identifier: Apache-2.0
// Scratch memory that a thread keeps for its next call. Fresh pages cost a fault each (a quarter of
// a microsecond per 4 KB): a third of the time of a short attention call went there.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace pentad {

// Memory on a cache-line boundary, uninitialised; given back to the thread that destroys it, which
// keeps up to kMostKept bytes.
class ScratchBytes {
 public:
  static constexpr size_t kMostKept = size_t{64} << 20;

  ScratchBytes() = default;
  explicit ScratchBytes(size_t bytes);  // throws std::bad_alloc
  ~ScratchBytes();
  ScratchBytes(ScratchBytes&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  ScratchBytes& operator=(ScratchBytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {}
  T* get() const { return static_cast<T*>(bytes_.get()); }

 private:
  ScratchBytes bytes_;
};

}  // namespace pentad
