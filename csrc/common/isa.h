// SPDX-License-Identifier: Apache-2.0
// Which instruction-set level serves this process. The choice is made once, at load, by the CPU's
// feature bits (never its vendor); PENTAD_ISA overrides it with a level that the CPU has.
#pragma once
#include <vector>

namespace pentad {

// x86-64-v2 (SSE4.2), v3 (AVX2, FMA, F16C), v4 (AVX-512 F/BW/DQ/VL/CD),
// v4x (v4 and VPOPCNTDQ, BITALG, VNNI, BF16, VBMI, VBMI2), AArch64 NEON.
enum class Isa { v2, v3, v4, v4x, neon };

const char* name(Isa level);
// The levels that are compiled in and that this CPU runs, lowest first.
const std::vector<Isa>& isa_available();
// The level in use. The first call throws std::invalid_argument when PENTAD_ISA names a level that
// is unknown or not available.
Isa isa();
// For tests, which run every level in one process. Not to be called while kernels run.
void set_isa(Isa level);
// Parses a name; throws std::invalid_argument for one that is not available here.
Isa isa_from_name(const char* text);

}  // namespace pentad
