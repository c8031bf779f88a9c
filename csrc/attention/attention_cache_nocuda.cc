// SPDX-License-Identifier: Apache-2.0
// In place of attention_decode.cu and attention_cache.cu where no CUDA compiler was found.
#include "attention/attention_cache_cuda.h"

namespace pentad::attention::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t decode_scratch(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) { missing(); }
void decode(const CudaStream&, const Problem&, const Caches&, const Outputs&, void*) { missing(); }
void append(const CudaStream&, const Problem&, const Caches&, const Operand&, const Operand&,
            int64_t) {
  missing();
}

}  // namespace pentad::attention::cuda
