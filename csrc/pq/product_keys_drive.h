// SPDX-License-Identifier: Apache-2.0
// What the two passes of product-key memory share.
#pragma once
#include "common/isa.h"
#include "pq/product_keys.h"
#include "pq/product_keys_kernels.h"

namespace pentad::pq::product_keys_drive {

// The table of the level in use.
inline const ProductKeysKernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::pq_product_keys_kernels;
    case Isa::v4: return v4::pq_product_keys_kernels;
    case Isa::v3: return v3::pq_product_keys_kernels;
    default: return v2::pq_product_keys_kernels;
#else
    default: return neon::pq_product_keys_kernels;
#endif
  }
}

inline const void* address(const TensorView& view, int64_t elements) {
  return static_cast<const char*>(view.data) + elements * size_of(view.dtype);
}

inline void* address(void* data, DType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

}  // namespace pentad::pq::product_keys_drive
