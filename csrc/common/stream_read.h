// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace pentad {

// Reads [data, data + bytes) once with all threads and returns the sum of its 64-bit words: the
// ceiling that memory-bound kernels are compared with.
uint64_t stream_read(const uint8_t* data, int64_t bytes);

}  // namespace pentad
