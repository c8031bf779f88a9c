// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace pentad {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pentad
