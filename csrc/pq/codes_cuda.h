// SPDX-License-Identifier: Apache-2.0
// codes.h on a CUDA device: the same bits. Contents are not looked at beforehand: of a code that does
// not fit, pack_codes keeps the low bits; of an id beyond the sizes, digits gives some.
#pragma once
#include "common/cuda_stream.h"
#include "pq/codes.h"

namespace pentad::pq::cuda {

void pack_codes(const CudaStream& stream, const Codes& codes, int nbits, uint8_t* packed);
void unpack_codes(const CudaStream& stream, const uint8_t* packed, int64_t row_stride,
                  int64_t stride, int64_t rows, int64_t columns, int nbits, void* out);
// seeds and sizes lie in the host's memory.
void hash_codes(const CudaStream& stream, const Codes& ids, const uint64_t* seeds,
                const int64_t* sizes, int64_t count, int64_t* out);
void digits(const CudaStream& stream, const Codes& ids, const int64_t* sizes, int64_t count,
            int64_t* out);

}  // namespace pentad::pq::cuda
