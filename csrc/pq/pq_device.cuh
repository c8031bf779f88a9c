// SPDX-License-Identifier: Apache-2.0
// What kernels of this folder read and write: codes of any integer type, floats of three.
#pragma once
#include "common/cuda_launch.cuh"
#include "common/tensor_view.h"
#include "pq/lookup.h"

namespace pentad::pq::cuda {

constexpr int kLanes = 256;  // of a block, where nothing else is said

// Division of what mostly fits in 32 bits, which takes a fifth of the instructions.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if ((static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

template <class T>
__device__ inline uint64_t integer_as(const void* data, int64_t at) {
  return static_cast<uint64_t>(static_cast<int64_t>(static_cast<const T*>(data)[at]));
}

// Any integer modulo 2^64.
__device__ inline uint64_t integer_at(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::u8: return integer_as<uint8_t>(data, at);
    case DType::i8: return integer_as<int8_t>(data, at);
    case DType::u16: return integer_as<uint16_t>(data, at);
    case DType::i16: return integer_as<int16_t>(data, at);
    case DType::u32: return integer_as<uint32_t>(data, at);
    case DType::i32: return integer_as<int32_t>(data, at);
    default: return integer_as<int64_t>(data, at);
  }
}

// The code, or -1 where it is none of [0, size).
__device__ inline int64_t code_below(const Codes& codes, int64_t row, int64_t column,
                                     int64_t size) {
  const uint64_t code =
      integer_at(codes.data, codes.dtype, row * codes.row_stride + column * codes.column_stride);
  return code < static_cast<uint64_t>(size) ? static_cast<int64_t>(code) : -1;
}

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

__device__ inline float float_at(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f16: return widened(static_cast<const __half*>(data)[at]);
    case DType::bf16: return widened(static_cast<const __nv_bfloat16*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

__device__ inline void write_float(void* data, DType dtype, int64_t at, float x) {
  switch (dtype) {
    case DType::f16: return narrow(x, static_cast<__half*>(data)[at]);
    case DType::bf16: return narrow(x, static_cast<__nv_bfloat16*>(data)[at]);
    default: static_cast<float*>(data)[at] = x;
  }
}

// What a code without a row gives.
__device__ inline float not_a_number() { return __uint_as_float(0x7fffffffu); }

// Takes arrays out of scratch memory, one after the other; from null, only counts.
class Pieces {
 public:
  explicit Pieces(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace pentad::pq::cuda
