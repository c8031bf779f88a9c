// SPDX-License-Identifier: Apache-2.0
// A lookup as kernels take it: tables of one shape by arithmetic, others from a list in memory.
#pragma once
#include "pq/pq_device.cuh"

namespace pentad::pq::cuda {

struct DeviceTable {
  const char* base;
  int64_t rows, step;  // bytes from row to row
  int64_t first;       // rows of the tables before
};

struct DeviceTables {
  DeviceTable one;          // the first
  int64_t apart;            // bytes from table to table
  const DeviceTable* list;  // (tables) where they differ, else null

  __device__ DeviceTable operator[](int64_t m) const {
    if (list) return list[m];
    return {one.base + m * apart, one.rows, one.step, m * one.rows};
  }
};

struct LookupTask {
  Codes codes;
  DeviceTables tables;
  int64_t width;
  const void* weights;
  DType weights_dtype;
  int64_t weight_row_stride, weight_stride;
  Codes offsets;
  bool bags;
  Combine combine;

  __device__ int64_t boundary(int64_t b) const {
    if (b >= offsets.rows) return codes.rows;
    const auto row =
        static_cast<int64_t>(integer_at(offsets.data, offsets.dtype, b * offsets.row_stride));
    return min(max(row, int64_t{0}), codes.rows);
  }
  __device__ int64_t first(int64_t b) const { return bags ? boundary(b) : b; }
  __device__ int64_t last(int64_t b) const { return bags ? boundary(b + 1) : b + 1; }
  __device__ float weight(int64_t i, int64_t m) const {
    return weights ? float_at(weights, weights_dtype, i * weight_row_stride + m * weight_stride)
                   : 1.0f;
  }
};

// Where the tables are listed, `list` (tables) is filled.
LookupTask task_of(const CudaStream& stream, const Lookup& problem, const Codes* offsets,
                   DeviceTable* list);
// Whether rows of tables are whole pieces of 16 bytes at multiples of 16.
bool has_whole_pieces(const Lookup& problem);

}  // namespace pentad::pq::cuda
