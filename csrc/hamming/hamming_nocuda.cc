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
int64_t topk_lists_scratch(int64_t, int64_t, int64_t, int64_t, int64_t) { missing(); }
void topk_lists(const CudaStream&, const Matrix<const uint8_t>&, const Matrix<const uint8_t>&,
                const Visits&, const uint8_t*, Metric, int64_t, void*, int64_t*, void*) {
  missing();
}
int64_t range_scratch(int64_t, int64_t) { missing(); }
void range_count(const CudaStream&, const Matrix<const uint8_t>&, const Matrix<const uint8_t>&,
                 const uint8_t*, Metric, uint32_t, int64_t*, void*, Product) {
  missing();
}
void range_write(const CudaStream&, const Matrix<const uint8_t>&, const Matrix<const uint8_t>&,
                 const uint8_t*, Metric, uint32_t, int64_t, void*, int64_t*, void*, Product) {
  missing();
}
void score(const CudaStream&, const Matrix<const float>&, const Matrix<const uint8_t>&, float*) {
  missing();
}
int64_t topk_score_scratch(int64_t, int64_t, int64_t) { missing(); }
void topk_score(const CudaStream&, const Matrix<const float>&, const Matrix<const uint8_t>&,
                const uint8_t*, int64_t, float*, int64_t*, void*) {
  missing();
}
void score_candidates(const CudaStream&, const Matrix<const float>&, const Matrix<const uint8_t>&,
                      const int64_t*, int64_t, float*) {
  missing();
}
void dot_candidates(const CudaStream&, const Matrix<const float>&, const void*, DType, const float*,
                    int64_t, const int64_t*, int64_t, float*) {
  missing();
}
int64_t weighted_sum_scratch(int64_t, int64_t, int64_t, int64_t) { missing(); }
void weighted_sum(const CudaStream&, const WeightedSum&, float*, void*) { missing(); }
void pack(const CudaStream&, const TensorView&, double, uint8_t*, int32_t*) { missing(); }
void unpack(const CudaStream&, const TensorView&, int64_t, DType, void*) { missing(); }
void permute(const CudaStream&, const TensorView&, int64_t, int64_t, uint8_t*) { missing(); }

}  // namespace pentad::hamming::cuda
