// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"
#include "scan/scan_kernels.h"

namespace pentad::scan {

const Kernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v2: return v2::scan_kernels;
    case Isa::v3: return v3::scan_kernels;
    case Isa::v4: return v4::scan_kernels;
    default: return v4x::scan_kernels;
#else
    default: return neon::scan_kernels;
#endif
  }
}

}  // namespace pentad::scan
