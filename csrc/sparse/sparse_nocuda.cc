// SPDX-License-Identifier: Apache-2.0
// In place of the *.cu files of this folder where no CUDA compiler was found.
#include "sparse/score_cuda.h"
#include "sparse/search_cuda.h"
#include "sparse/splade_cuda.h"

namespace pentad::sparse::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t splade_scratch(int64_t, int64_t) { missing(); }
void splade_head(const CudaStream&, const SpladeHead&, const SpladeOutputs&, void*) { missing(); }
int64_t splade_backward_scratch(const SpladeHead&) { missing(); }
void splade_head_backward(const CudaStream&, const SpladeHead&, const SpladeGradients&, void*) {
  missing();
}

int64_t score_scratch(int64_t, int64_t) { missing(); }
void score(const CudaStream&, const Rows<float>&, const Rows<float>&, int64_t, float*, void*) {
  missing();
}
int64_t score_backward_scratch(int64_t, int64_t, int64_t, int64_t, int64_t) { missing(); }
void score_backward(const CudaStream&, const Rows<float>&, const Rows<float>&, int64_t,
                    const float*, float*, float*, void*) {
  missing();
}
void score_pairs(const CudaStream&, const Rows<float>&, const Rows<float>&, const Pairs&, float*) {
  missing();
}
void score_pairs_backward(const CudaStream&, const Rows<float>&, const Rows<float>&,
                          const PairsOfRows&, const float*, float*) {
  missing();
}
int64_t search_scratch(int64_t, int64_t, int64_t) { missing(); }
void search(const CudaStream&, const Inverted&, const Rows<float>&, int64_t, float*, int64_t*,
            void*) {
  missing();
}
void select_topk(const CudaStream&, const FloatRows&, int64_t, bool, void*, DType, void*, void*) {
  missing();
}

}  // namespace pentad::sparse::cuda
