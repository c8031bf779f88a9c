// SPDX-License-Identifier: Apache-2.0
// Codes as integers: packed into bits, hashed, taken apart.
//
//   pack      codes (n, M) < 2^nbits -> (n, ceil(M * nbits / 8)) bytes; code m takes the bits
//             [m * nbits, (m + 1) * nbits) of its row, bit b being bit b % 8 of byte b / 8; the
// rest 0
//   unpack    the other way round
//   hash      ids (n) -> (n, H): h = mix(id + mix(seed + 0x9e3779b97f4a7c15)), mix being the finalizer
//             of SplitMix64, and ((h >> 32) * size) >> 32; arithmetic modulo 2^64
//   digits    ids (n) -> (n, H): floor(id / (size_0 ... size_{h-1})) mod size_h
#pragma once
#include "pq/lookup.h"

namespace pentad::pq {

constexpr int kMostBits = 16;

// Throws std::invalid_argument for a code that does not fit.
void pack_codes(const char* op, const Codes& codes, int nbits, uint8_t* packed);
// out: uint8 for up to 8 bits, else int32.
void unpack_codes(const uint8_t* packed, int64_t row_stride, int64_t stride, int64_t rows,
                  int64_t columns, int nbits, void* out);
// ids: one column; sizes in [1, 2^31 - 1].
void hash_codes(const Codes& ids, const uint64_t* seeds, const int64_t* sizes, int64_t count,
                int64_t* out);
// Throws std::invalid_argument for an id outside of [0, product of sizes).
void digits(const char* op, const Codes& ids, const int64_t* sizes, int64_t count, int64_t* out);

}  // namespace pentad::pq
