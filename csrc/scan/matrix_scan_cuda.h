// SPDX-License-Identifier: Apache-2.0
// The entries of matrix_scan.h that run on a CUDA device: the same mathematics on arrays in the
// device's memory (no float64), of any strides. They put kernels on the stream and return. Scratch
// memory comes from the caller, at least as many bytes as the function beside says, aligned to 16.
//
// Lists of integers are the device's too, and nobody has looked at them: boundaries that do not rise
// from 0 to the length and rows that are out of range or come twice give wrong results, but no
// access out of bounds.
//
// Deterministic: every sum has one order, which the shapes alone decide. Products are of floats in
// three parts on tensor cores (matrix_tiles.cuh), right to about 2^-21 of each term.
#pragma once
#include "common/cuda_stream.h"
#include "scan/matrix_scan.h"

namespace pentad::scan::cuda {

// int32 or int64 in the device's memory; null: absent.
struct Integers {
  const void* data = nullptr;
  bool wide = false;  // int64
  int64_t stride = 1;
};

// `begin` of the problem is not read: [sequences + 1] boundaries stand in its place, or none. stored
// is as on the CPU, and may be null.
struct Packed {
  Integers begin;
  int64_t sequences = 0;  // of the batch, where there are no boundaries
};

int64_t matrix_forward_scratch(const MatrixScan&, const Packed&, bool stored);
void matrix_forward(const CudaStream&, const MatrixScan&, const Packed&, const Operand& out,
                    const Operand& last, float* stored, void* scratch);

int64_t matrix_backward_scratch(const MatrixScan&, const Packed&);
void matrix_backward(const CudaStream&, const MatrixScan&, const Packed&,
                     const MatrixScanGradients&, void* scratch);

// `rows` of the problem is not read: [batch] rows of `state_rows` stand in its place, or none.
void matrix_update(const CudaStream&, const MatrixUpdate&, const Integers& rows,
                   int64_t state_rows);

}  // namespace pentad::scan::cuda
