// SPDX-License-Identifier: Apache-2.0
// Tensor-core products of a warp: one instruction on a device (sm_80 and later), the same product of
// the lanes' fragments on the CPU. With g = lane / 4 and t = lane % 4, lane holds
//
//   A (16 rows):    a[0] row g, a[1] row g + 8, column group t; a[2], a[3] the same, group t + 4
//   B (8 columns):  b[0] column g, row group t; b[1] the same, group t + 4
//   C (16, 8):      c[0], c[1] row g, columns 2t, 2t + 1; c[2], c[3] row g + 8
//
// where a group is one 32-bit register of the inner dimension: 32 bits, or two 16-bit floats.
//
// ldmatrix brings four matrices of 8 by 8 16-bit floats from shared memory into such registers: lane
// l gives the address of row l % 8 of matrix l / 8, 16 bytes and a multiple of 16, and gets in r[m]
// the group t of row g of matrix m. Transposed, that is of column g: rows 2t and 2t + 1.
#pragma once
#include "common/cuda_launch.cuh"

namespace pentad {

#if defined(__CUDACC__)

// c += popcount(a and b): (16, 256) bits by (256, 8) bits. Native on sm_80 and sm_90, where the xor
// form is emulated on sm_90; on sm_100 both are.
__device__ inline void mma_and_popc(int32_t (&c)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b: (16, 16) by (16, 8), float sums.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats, each rounded, as one group; `low` is the first.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// c += a b: (16, 8) by (8, 8), one float to a register, of which the product sees the first 19 bits.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

namespace cuda_host {

template <class C>
struct Fragments {
  C* c;
  const uint32_t *a, *b;
};

// dot(a register, b register) is their part of the sum.
template <class C, auto dot>
void mma(const char* what, C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Where& where) {
  Fragments<C> payload{c, a, b};
  warp_collective(
      what, kFullWarp, &payload,
      [](void* const* payloads, int) {
        const auto lane = [&](int g, int t) {
          return *static_cast<const Fragments<C>*>(payloads[g * 4 + t]);
        };
        for (int row = 0; row < 16; ++row)
          for (int column = 0; column < 8; ++column) {
            C& sum = lane(row % 8, column / 2).c[row / 8 * 2 + column % 2];
            for (int k = 0; k < 8; ++k)
              sum += dot(lane(row % 8, k % 4).a[k / 4 * 2 + row / 8], lane(column, k % 4).b[k / 4]);
          }
      },
      where);
}

struct MatrixRows {
  const void* row;
  uint32_t* r;
};

template <bool transposed>
void load_matrices(const char* what, uint32_t (&r)[4], const void* row, const Where& where) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    throw Misuse("ldmatrix of an address that is no multiple of 16");
  MatrixRows payload{row, r};
  warp_collective(
      what, kFullWarp, &payload,
      [](void* const* payloads, int) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t values[8][8];
          for (int i = 0; i < 8; ++i)
            std::memcpy(values[i], static_cast<MatrixRows*>(payloads[matrix * 8 + i])->row, 16);
          for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t low = transposed ? values[t][g] : values[g][t];
            const uint32_t high = transposed ? values[t + 1][g] : values[g][t + 1];
            static_cast<MatrixRows*>(payloads[lane])->r[matrix] = low | high << 16;
          }
        }
      },
      where);
}

}  // namespace cuda_host

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16(low).bits | uint32_t{__float2bfloat16(high).bits} << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return __float2half(low).bits | uint32_t{__float2half(high).bits} << 16;
}

inline void ldmatrix(uint32_t (&r)[4], const void* row,
                     const std::source_location& where = std::source_location::current()) {
  cuda_host::load_matrices<false>("ldmatrix", r, row, where);
}
inline void ldmatrix_transposed(
    uint32_t (&r)[4], const void* row,
    const std::source_location& where = std::source_location::current()) {
  cuda_host::load_matrices<true>("ldmatrix_transposed", r, row, where);
}

inline void mma_and_popc(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const std::source_location& where = std::source_location::current()) {
  cuda_host::mma<int32_t, [](uint32_t x, uint32_t y) { return std::popcount(x & y); }>(
      "mma_and_popc", c, a, b, where);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const std::source_location& where = std::source_location::current()) {
  cuda_host::mma<float, [](uint32_t x, uint32_t y) {
    return static_cast<float>(real_from_bf16(x & 0xffff) * real_from_bf16(y & 0xffff) +
                              real_from_bf16(x >> 16) * real_from_bf16(y >> 16));
  }>("mma_bf16", c, a, b, where);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const std::source_location& where = std::source_location::current()) {
  cuda_host::mma<float, [](uint32_t x, uint32_t y) {
    return static_cast<float>(real_from_half(x & 0xffff) * real_from_half(y & 0xffff) +
                              real_from_half(x >> 16) * real_from_half(y >> 16));
  }>("mma_f16", c, a, b, where);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const std::source_location& where = std::source_location::current()) {
  using Lane = cuda_host::Fragments<float>;
  Lane payload{c, a, b};
  cuda_host::warp_collective(
      "mma_tf32", kFullWarp, &payload,
      [](void* const* payloads, int) {
        const auto lane = [&](int i) { return static_cast<const Lane*>(payloads[i]); };
        const auto rounded = [](uint32_t x) { return std::bit_cast<float>(x & 0xffffe000); };
        float x[16][8], y[8][8], sums[16][8] = {};
        for (int i = 0; i < 32; ++i) {
          const int g = i / 4, t = i % 4;
          for (int e = 0; e < 4; ++e) x[g + e % 2 * 8][t + e / 2 * 4] = rounded(lane(i)->a[e]);
          for (int e = 0; e < 2; ++e) y[t + e * 4][g] = rounded(lane(i)->b[e]);
        }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 8; ++k)
            for (int column = 0; column < 8; ++column)
              sums[row][column] += x[row][k] * y[k][column];
        for (int i = 0; i < 32; ++i)
          for (int e = 0; e < 4; ++e) lane(i)->c[e] += sums[i / 4 + e / 2 * 8][i % 4 * 2 + e % 2];
      },
      where);
}

#endif

// Two floats as the halves of a register, the first in the low one; rounded to nearest even.
#if defined(__CUDACC__)
__device__ inline uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t f16_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
#else
inline uint32_t bf16_pair(float low, float high) {
  return __float2bfloat16(low).bits | uint32_t{__float2bfloat16(high).bits} << 16;
}
inline uint32_t f16_pair(float low, float high) {
  return __float2half(low).bits | uint32_t{__float2half(high).bits} << 16;
}
#endif

}  // namespace pentad
