// SPDX-License-Identifier: Apache-2.0
// What happens to a tile of scores in the lanes' registers: which of them are seen, what dropout
// keeps, and their exponentials. kByKeys: the tile's own rows are keys and its columns queries.
#pragma once
#include "attention/attention_product.cuh"

namespace pentad::attention::cuda {

// 2^x; of 16-bit arrays by the instruction alone, whose relative error is 2^-22.
template <class T>
__device__ inline float exp2_of(float x) {
#if defined(__CUDACC__)
  if (sizeof(T) == 2) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  return exp2f(x);
}

// Element e = (m kN + n) 4 + r of a lane's scores.
template <int kN>
struct Element {
  int row, column;
  __device__ explicit Element(int e)
      : row(e / (4 * kN) * 16 + e % 4 / 2 * 8 + lane_of_warp() / 4),
        column(e / 4 % kN * 8 + lane_of_warp() % 4 * 2 + e % 2) {}
};

// Bit e: whether own row + element.row sees, or is seen by, the other side's.
template <bool kByKeys, int kM, int kN>
__device__ uint64_t seen_bits(const HeadRules& head, int own, int other) {
  uint64_t seen = 0;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = own + i * 8 + lane_of_warp() / 4;
    int first, last;
    if (kByKeys) head.queries_of(row, &first, &last);
    else head.keys_of(row, &first, &last);
    first -= other + lane_of_warp() % 4 * 2;
    last -= other + lane_of_warp() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        seen |= static_cast<uint64_t>(n * 8 + r >= first && n * 8 + r <= last)
                << ((i / 2 * kN + n) * 4 + i % 2 * 2 + r);
  }
  if (!head.rules.choose()) return seen;
#pragma unroll 1
  for (uint64_t rest = seen; rest; rest &= rest - 1) {
    const int e = __ffsll(static_cast<long long>(rest)) - 1;
    const Element<kN> at(e);
    const int i = kByKeys ? other + at.column : own + at.row;
    const int j = kByKeys ? own + at.row : other + at.column;
    if (!head.chooses(i, j)) seen &= ~(uint64_t{1} << e);
  }
  return seen;
}

// Bit e: whether dropout keeps it.
template <bool kByKeys, int kM, int kN>
__device__ uint64_t kept_bits(const HeadRules& head, int own, int other) {
  uint64_t kept = 0;
#pragma unroll 1
  for (int e = 0; e < kM * kN * 4; e += kByKeys ? 1 : 2) {
    const Element<kN> at(e);
    const int i = kByKeys ? other + at.column : own + at.row;
    const int j = kByKeys ? own + at.row : other + at.column;
    const uint32_t bits = kept_of_four(head, i, j) >> j % 4;
    kept |= static_cast<uint64_t>(bits & (kByKeys ? 1 : 3)) << e;
  }
  return kept;
}

// The pair that element e is.
template <bool kByKeys, int kN>
struct Pair {
  int i, j;
  __device__ Pair(int e, int own, int other) {
    const Element<kN> at(e);
    i = kByKeys ? other + at.column : own + at.row;
    j = kByKeys ? own + at.row : other + at.column;
  }
};

// Scores take their way through memory of the lane's own where something is added to them: a loop
// over the registers would be as many copies of that code.
template <int kM, int kN>
__device__ void stow(const float (&c)[kM][kN][4], float* spare) {
#pragma unroll
  for (int e = 0; e < kM * kN * 4; ++e)
    spare[e * blockDim.x + threadIdx.x] = c[e / (4 * kN)][e / 4 % kN][e % 4];
}
template <int kM, int kN>
__device__ void fetch(float (&c)[kM][kN][4], const float* spare) {
#pragma unroll
  for (int e = 0; e < kM * kN * 4; ++e)
    c[e / (4 * kN)][e / 4 % kN][e % 4] = spare[e * blockDim.x + threadIdx.x];
}

// Products c become scores in units of log2; -inf where nothing is seen. spare: (4 kM kN, lanes) in
// shared memory where the rules modify scores.
template <bool kByKeys, int kM, int kN>
__device__ void to_scores(const HeadRules& head, uint64_t seen, int own, int other,
                          float (&c)[kM][kN][4], float* spare) {
  if (!head.rules.modify()) {
#pragma unroll
    for (int e = 0; e < kM * kN * 4; ++e) {
      float& x = c[e / (4 * kN)][e / 4 % kN][e % 4];
      x = seen >> e & 1 ? x * head.rules.scale_log2 : -infinity();
    }
    return;
  }
  stow(c, spare);
#pragma unroll 1
  for (int e = 0; e < kM * kN * 4; ++e) {
    float& x = spare[e * blockDim.x + threadIdx.x];
    const Pair<kByKeys, kN> at(e, own, other);
    float ignored;
    x = seen >> e & 1 ? head.score(x, at.i, at.j, &ignored) : -infinity();
  }
  fetch(c, spare);
}

// What dropout does not keep becomes 0.
template <bool kByKeys, int kM, int kN>
__device__ void drop(const HeadRules& head, int own, int other, float (&p)[kM][kN][4]) {
  const uint64_t kept = kept_bits<kByKeys, kM, kN>(head, own, other);
#pragma unroll
  for (int e = 0; e < kM * kN * 4; ++e)
    if (!(kept >> e & 1)) p[e / (4 * kN)][e / 4 % kN][e % 4] = 0.0f;
}

}  // namespace pentad::attention::cuda
