// SPDX-License-Identifier: Apache-2.0
// Between numbers and bits: pack, unpack, permute. A lane has one byte of a code, so it reads or
// writes eight neighbouring numbers, whole sectors of memory.
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "hamming/hamming_cuda.h"

namespace pentad::hamming::cuda {
namespace {

constexpr int kLanes = 256;
constexpr int kMaxLead = TensorView::kMaxRank - 1;

// Where the rows of an array of any rank and strides begin: the vectors of its last dimension.
struct Rows {
  int64_t count = 1, stride;  // rows, and between the elements of one
  int lead = 0;               // dimensions before the last; those that lie in a line are one
  int64_t shape[kMaxLead] = {}, strides[kMaxLead] = {};

  explicit Rows(const TensorView& view) : stride(view.strides[view.rank - 1]) {
    for (int d = 0; d + 1 < view.rank; ++d) {
      count *= view.shape[d];
      if (view.shape[d] == 1) continue;
      const bool in_line = lead && strides[lead - 1] == view.shape[d] * view.strides[d];
      if (!in_line) shape[lead++] = 1;
      shape[lead - 1] *= view.shape[d];
      strides[lead - 1] = view.strides[d];
    }
  }

  __device__ int64_t begin(int64_t row) const {
    int64_t at = 0;
#pragma unroll
    for (int d = kMaxLead - 1; d > 0; --d) {
      if (d >= lead) continue;
      at += row % shape[d] * strides[d];
      row /= shape[d];
    }
    return at + row * strides[0];
  }
};

template <class T>
struct alignas(8 * sizeof(T) < 16 ? 8 : 16) Eight {
  T at[8];
};

template <class T>
bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Eight<T>) == 0;
}

// --- pack -------------------------------------------------------------------------------------------

__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(int8_t x) { return x; }
__device__ inline float wide(uint8_t x) { return x; }
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Pack {
  const T* x;
  Rows rows;
  int64_t dim, bytes;
  bool whole;  // every eight numbers are an aligned Eight
  Wide<T> threshold;
  uint8_t* codes;
  int32_t* nan;
};

// x (rows, dim) -> codes (rows, bytes).
// Limit: memory, the numbers that are read.
template <class T>
__global__ void __launch_bounds__(kLanes) pack_kernel(Pack<T> in) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  if (i >= in.rows.count * in.bytes) return;
  const int64_t row = i / in.bytes, first = i % in.bytes * 8;
  const T* from = in.x + in.rows.begin(row) + first * in.rows.stride;
  const int count = static_cast<int>(min(int64_t{8}, in.dim - first));
  Eight<T> numbers;
  if (in.whole) {
    numbers = *reinterpret_cast<const Eight<T>*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) numbers.at[j] = from[j * in.rows.stride];
  }
  unsigned byte = 0;
  bool nan = false;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= count) continue;
    const Wide<T> value = wide(numbers.at[j]);
    nan = nan || value != value;
    if (value > in.threshold) byte |= 0x80u >> j;
  }
  in.codes[i] = static_cast<uint8_t>(byte);
  if (nan && in.nan) atomicOr(in.nan, 1);
}

template <class T>
void pack_as(const CudaStream& stream, const TensorView& x, double threshold, uint8_t* codes,
             int32_t* nan) {
  const int64_t dim = x.shape[x.rank - 1];
  Pack<T> in{static_cast<const T*>(x.data),   Rows(x), dim, ceil_div(dim, 8), false,
             static_cast<Wide<T>>(threshold), codes,   nan};
  if (in.rows.count * in.bytes == 0) return;
  in.whole = dim % 8 == 0 && in.rows.stride == 1 && aligned<T>(x.data);
  for (int d = 0; d < in.rows.lead; ++d) in.whole = in.whole && in.rows.strides[d] % 8 == 0;
  const Grid grid{blocks_of(ceil_div(in.rows.count * in.bytes, kLanes)), kLanes};
  launch(stream, "hamming: pack", pack_kernel<T>, grid, in);
}

// --- unpack -----------------------------------------------------------------------------------------

struct Unpack {
  const uint8_t* codes;
  Rows rows;
  int64_t dim, bytes;
  bool whole;
  void* out;
};

// codes (rows, bytes) -> out (rows, dim) of +-1.
// Limit: memory, the numbers that are written.
template <class T>
__global__ void __launch_bounds__(kLanes) unpack_kernel(Unpack in, T one, T minus_one) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  if (i >= in.rows.count * in.bytes) return;
  const int64_t row = i / in.bytes, byte = i % in.bytes;
  const unsigned bits = in.codes[in.rows.begin(row) + byte * in.rows.stride];
  Eight<T> numbers;
#pragma unroll
  for (int j = 0; j < 8; ++j) numbers.at[j] = bits & 0x80u >> j ? one : minus_one;
  T* to = static_cast<T*>(in.out) + row * in.dim + byte * 8;
  if (in.whole) {
    *reinterpret_cast<Eight<T>*>(to) = numbers;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (byte * 8 + j < in.dim) to[j] = numbers.at[j];
  }
}

// The numbers as their bits, so that types of one size share a kernel.
template <class T>
void unpack_as(const CudaStream& stream, const TensorView& codes, int64_t dim, void* out, T one,
               T minus_one) {
  Unpack in{
      static_cast<const uint8_t*>(codes.data), Rows(codes), dim, ceil_div(dim, 8), false, out};
  if (in.rows.count * in.bytes == 0) return;
  in.whole = dim % 8 == 0 && aligned<T>(out);
  const Grid grid{blocks_of(ceil_div(in.rows.count * in.bytes, kLanes)), kLanes};
  launch(stream, "hamming: unpack", unpack_kernel<T>, grid, in, one, minus_one);
}

// --- permute ----------------------------------------------------------------------------------------

struct Permute {
  const uint8_t* codes;
  Rows rows;
  int64_t dim, bytes, shift;  // 0 <= shift < dim
  uint8_t* out;
};

// codes (rows, bytes) -> out (rows, bytes), bit j of a code to bit (j + shift) mod dim.
// Limit: memory; of a byte that wraps, its eight loads.
__global__ void __launch_bounds__(kLanes) permute_kernel(Permute in) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  if (i >= in.rows.count * in.bytes) return;
  const int64_t row = i / in.bytes, first = i % in.bytes * 8;
  const uint8_t* code = in.codes + in.rows.begin(row);
  int64_t from = first - in.shift;
  if (from < 0) from += in.dim;
  unsigned byte = 0;
  if (from + 8 <= in.dim && first + 8 <= in.dim) {
    const int offset = static_cast<int>(from % 8);
    byte = code[from / 8 * in.rows.stride];
    if (offset) byte = byte << offset | code[(from / 8 + 1) * in.rows.stride] >> (8 - offset);
  } else {
    for (int j = 0; j < 8 && first + j < in.dim; ++j) {
      if (code[from / 8 * in.rows.stride] & 0x80u >> from % 8) byte |= 0x80u >> j;
      if (++from == in.dim) from = 0;
    }
  }
  in.out[i] = static_cast<uint8_t>(byte);
}

}  // namespace

void pack(const CudaStream& stream, const TensorView& x, double threshold, uint8_t* codes,
          int32_t* nan) {
  switch (x.dtype) {
    case DType::f32: return pack_as<float>(stream, x, threshold, codes, nan);
    case DType::f16: return pack_as<__half>(stream, x, threshold, codes, nan);
    case DType::bf16: return pack_as<__nv_bfloat16>(stream, x, threshold, codes, nan);
    case DType::f64: return pack_as<double>(stream, x, threshold, codes, nan);
    case DType::i8: return pack_as<int8_t>(stream, x, threshold, codes, nan);
    default: return pack_as<uint8_t>(stream, x, threshold, codes, nan);  // boolean
  }
}

void unpack(const CudaStream& stream, const TensorView& codes, int64_t dim, DType dtype,
            void* out) {
  switch (dtype) {
    case DType::f32: return unpack_as<float>(stream, codes, dim, out, 1, -1);
    case DType::f64: return unpack_as<double>(stream, codes, dim, out, 1, -1);
    case DType::i8: return unpack_as<int8_t>(stream, codes, dim, out, 1, -1);
    case DType::f16: return unpack_as<uint16_t>(stream, codes, dim, out, 0x3c00, 0xbc00);
    default: return unpack_as<uint16_t>(stream, codes, dim, out, 0x3f80, 0xbf80);  // bf16
  }
}

void permute(const CudaStream& stream, const TensorView& codes, int64_t dim, int64_t shift,
             uint8_t* out) {
  const Permute in{static_cast<const uint8_t*>(codes.data), Rows(codes), dim, ceil_div(dim, 8),
                   dim ? (shift % dim + dim) % dim : 0,     out};
  if (in.rows.count * in.bytes == 0) return;
  const Grid grid{blocks_of(ceil_div(in.rows.count * in.bytes, kLanes)), kLanes};
  launch(stream, "hamming: permute", permute_kernel, grid, in);
}

}  // namespace pentad::hamming::cuda
