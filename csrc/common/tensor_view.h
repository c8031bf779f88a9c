// SPDX-License-Identifier: Apache-2.0
// What every kernel entry is given instead of a framework's tensor.
#pragma once
#include <cstdint>

namespace pentad {

enum class DType : uint8_t { u8, i8, u16, i16, u32, i32, u64, i64, f16, bf16, f32, f64, boolean };

// Bytes of one element.
static constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
    case DType::i8:
    case DType::boolean: return 1;
    case DType::u16:
    case DType::i16:
    case DType::f16:
    case DType::bf16: return 2;
    case DType::u32:
    case DType::i32:
    case DType::f32: return 4;
    default: return 8;
  }
}

// Strides count elements, not bytes, and may be zero or negative.
struct TensorView {
  static constexpr int kMaxRank = 8;

  void* data = nullptr;
  DType dtype = DType::u8;
  bool read_only = false;
  int device_type = 1;  // DLPack's numbers: 1 CPU, 2 CUDA
  int device_id = 0;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};
};

// A 2-D view with a known element type, which is what most kernels work on.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 1;

  T* row(int64_t i) const { return data + i * row_stride; }
};

}  // namespace pentad
