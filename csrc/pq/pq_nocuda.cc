// SPDX-License-Identifier: Apache-2.0
// In place of the *.cu files of this folder where no CUDA compiler was found.
#include "pq/assign_cuda.h"
#include "pq/codes_cuda.h"
#include "pq/lookup_cuda.h"
#include "pq/product_keys_cuda.h"

namespace pentad::pq::cuda {
namespace {

[[noreturn]] void missing() { throw DeviceError("this build of pentad has no CUDA kernels"); }

}  // namespace

int64_t assign_scratch(int64_t, int64_t, int64_t, int64_t, int64_t) { missing(); }
void assign(const CudaStream&, const Array3&, const Array3&, Nearest, const Assigned&, void*) {
  missing();
}
void pack_codes(const CudaStream&, const Codes&, int, uint8_t*) { missing(); }
void unpack_codes(const CudaStream&, const uint8_t*, int64_t, int64_t, int64_t, int64_t, int,
                  void*) {
  missing();
}
void hash_codes(const CudaStream&, const Codes&, const uint64_t*, const int64_t*, int64_t,
                int64_t*) {
  missing();
}
void digits(const CudaStream&, const Codes&, const int64_t*, int64_t, int64_t*) { missing(); }
int64_t lookup_scratch(int64_t) { missing(); }
void lookup(const CudaStream&, const Lookup&, const Codes*, void*, void*) { missing(); }
int64_t lookup_backward_scratch(int64_t, int64_t, int64_t, int64_t, bool) { missing(); }
void lookup_backward(const CudaStream&, const Lookup&, const Codes*, const LookupGradients&,
                     void*) {
  missing();
}
void score_tables(const CudaStream&, const ScoreTables&, float*) { missing(); }
void table_sum(const CudaStream&, const float*, int64_t, int64_t, const Codes&, float*) {
  missing();
}
int64_t table_sum_backward_scratch(int64_t, int64_t, int64_t, int64_t) { missing(); }
void table_sum_backward(const CudaStream&, const float*, int64_t, int64_t, int64_t, int64_t,
                        const Codes&, float*, void*) {
  missing();
}

int64_t product_keys_scratch(int64_t, int64_t, int64_t, int64_t) { missing(); }
void product_keys(const CudaStream&, const ProductKeys&, const ProductKeysOut&, void*) {
  missing();
}
int64_t product_keys_backward_scratch(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                      int64_t) {
  missing();
}
void product_keys_backward(const CudaStream&, const ProductKeys&, const ProductKeysGrad&,
                           const int64_t*, int64_t, void*) {
  missing();
}

}  // namespace pentad::pq::cuda
