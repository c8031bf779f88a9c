// SPDX-License-Identifier: Apache-2.0
// In place of the *.cu files of this folder where no CUDA compiler was found.
#include "hamming/hamming_cuda.h"

namespace pentad::hamming::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t distance_scratch(int64_t, int64_t) { missing(); }
void distance(const CudaStream&, const Matrix<const uint8_t>&, const Matrix<const uint8_t>&, Metric,
              void*, void*, Product) {
  missing();
}
int64_t topk_scratch(int64_t, int64_t, int64_t) { missing(); }
void topk(const CudaStream&, const Matrix<const uint8_t>&, const Matrix<const uint8_t>&,
          const uint8_t*, Metric, int64_t, void*, int64_t*, void*, Product) {
  missing();
}
void score(const CudaStream&, const Matrix<const float>&, const Matrix<const uint8_t>&, float*) {
  missing();
}
int64_t weighted_sum_scratch(int64_t, int64_t, int64_t, int64_t) { missing(); }
void weighted_sum(const CudaStream&, const WeightedSum&, float*, void*) { missing(); }

}  // namespace pentad::hamming::cuda
