// SPDX-License-Identifier: Apache-2.0
// The entries of scan.h that run on a CUDA device: the same mathematics and arguments
// (no f64), on arrays in the device's memory. They put kernels on the stream and return; nothing is
// allocated, copied to the host or waited for. Scratch memory comes from the caller, at least as
// many bytes as the function beside says, aligned to 16. scan_nocuda.cc stands in where no CUDA
// compiler was.
//
// Lists (boundaries of sequences, rows of caches) lie on the device too, where nobody can look at
// them first: kernels bring what they read into range, so that wrong lists give wrong numbers and no
// wrong access. The lists of the problems themselves (`begin`, `rows`, ...) stay empty.
//
// Results repeat bit for bit: sums over channels, time and sequences are cut by shapes alone and
// added in one order.
#pragma once
#include "common/cuda_stream.h"
#include "scan/scan.h"

namespace pentad::scan::cuda {

// Integers, i32 or i64, in the device's memory; null: absent.
struct Indices {
  const void* data = nullptr;
  DType dtype = DType::i64;
  int64_t stride = 1, count = 0;
};

// `begin` has the boundaries of packed sequences. `spans` cuts each sequence's time into that many
// pieces that run side by side (0: by the shapes; packed sequences are never cut).
int64_t selective_scan_forward_scratch(int64_t batch, int64_t dim, int64_t length, int64_t states,
                                       bool complex, int64_t sequences, bool packed,
                                       int64_t spans = 0);
void selective_scan_forward(const CudaStream& stream, const SelectiveScan&, const Indices& begin,
                            const Operand& out, const Operand& last, float* stored, void* scratch,
                            int64_t spans = 0);

int64_t selective_scan_backward_scratch(int64_t batch, int64_t dim, int64_t length, int64_t states,
                                        int64_t groups, bool complex, int64_t sequences,
                                        bool packed, int64_t spans = 0);
void selective_scan_backward(const CudaStream& stream, const SelectiveScan&, const Indices& begin,
                             const SelectiveScanGradients&, void* scratch, int64_t spans = 0);

// The cache has `cache_rows` rows; one that lies outside is padding.
void state_update(const CudaStream& stream, const StateUpdate&, const Indices& rows,
                  int64_t cache_rows);

void few_rows_linear(const CudaStream& stream, const FewRowsLinear&, const Operand& out);

void recurrence_forward(const CudaStream& stream, const Recurrence&, const Operand& h);
void recurrence_backward(const CudaStream& stream, const Recurrence&, const RecurrenceGradients&);

void causal_conv_forward(const CudaStream& stream, const CausalConv&, const Indices& begin,
                         const Operand& out, const Operand& final);
int64_t causal_conv_backward_scratch(int64_t batch, int64_t dim, int64_t length, int64_t width);
void causal_conv_backward(const CudaStream& stream, const CausalConv&, const Indices& begin,
                          const CausalConvGradients&, void* scratch);

void causal_conv_update(const CudaStream& stream, const ConvUpdate&, const Indices& rows,
                        const Indices& positions, int64_t cache_rows);

}  // namespace pentad::scan::cuda
