// SPDX-License-Identifier: Apache-2.0
// forward and backward of attention.h on a CUDA device: the same mathematics on arrays in the
// device's memory, f32, bf16 or f16. They put kernels on the stream and return; nothing is
// allocated, copied to the host or waited for. Scratch memory comes from the caller, at least as many
// bytes as the function beside says, aligned to 16. attention_nocuda.cc stands in where no CUDA
// compiler was.
//
// Of a Problem, the lists of caches are unused and those of packed sequences are given as Packed;
// max_q and max_k are then the totals of tokens. The block mask's lists lie on the device.
//
// Error budget: products of 16-bit pairs are exact and summed in fp32; p and its gradient are
// rounded to the arrays' dtype before they meet values, keys and queries of 16 bits. Everything is
// fp32 for f32. Results have the same bits on every run: no atomics, and the sums have one order.
#pragma once
#include <cstdint>

#include "attention/attention.h"
#include "common/cuda_stream.h"

namespace pentad::attention::cuda {

constexpr int64_t kMostRows = int64_t{1} << 30;  // of a sequence: positions are 32-bit numbers

// (batch + 1) int32 or int64 numbers that ascend from 0 to the total; what does not is cut off.
struct Boundaries {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride = 1;
};
struct Packed {
  Boundaries q, k;
  bool given() const { return q.data != nullptr; }
};

// rows: of lse, that is batch * heads * max_q, or heads * the total. forward needs it for key_mass.
int64_t scratch_bytes(int64_t rows);
void forward(const CudaStream& stream, const Problem& problem, const Packed& packed,
             const Outputs& outputs, void* scratch);
void backward(const CudaStream& stream, const Problem& problem, const Packed& packed,
              const Gradients& gradients, void* scratch);

}  // namespace pentad::attention::cuda
