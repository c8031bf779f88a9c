// SPDX-License-Identifier: Apache-2.0
// The gradients of a tile of scores (attention.h, "Backward"), and how blocks are cut for them.
#pragma once
#include "attention/attention_sums.cuh"

namespace pentad::attention::cuda {

// Four tiles lie in shared memory: of the own side and of the other, of rows that make scores (q, k)
// and of rows that make their gradients (do, v).
template <class T, int kDim>
struct GradientShape {
  static constexpr bool k16 = sizeof(T) == 2;
  static constexpr int kM = 1;
  static constexpr int kWarps = k16 ? (kDim <= 256 ? 4 : 2) : kDim <= 128 ? 4 : kDim <= 256 ? 2 : 1;
  static constexpr int kOwn = kWarps * kM * 16, kLanes = kWarps * 32;
  static constexpr int kOther = k16 ? (kDim <= 64 ? 64 : 32) : kDim <= 128 ? 32 : 16;
  static constexpr int kStages = kDim <= (k16 ? 128 : 64) ? 2 : 1;
  static constexpr int kPitch = pitch_of<T>(kDim);
  static constexpr int kOwnTile = kOwn * kPitch, kOtherTile = kOther * kPitch;
  static constexpr size_t kShared =
      2 * shared_bytes<T>(kOwnTile) + 2 * kStages * shared_bytes<T>(kOtherTile);
};

struct Backward {
  Rules rules;
  Sequences sequences;
  Array q, k, v, d_out;
  RowFacts facts;
  const float* d_key_mass;
  int dim, value_dim;
  bool dropout;

  Backward(const Problem& p, const Packed& packed, const Gradients& g, const RowFacts& facts)
      : rules(p, packed.given()),
        sequences(p, packed),
        q(p.q, packed),
        k(p.k, packed),
        v(p.v, packed),
        d_out(g.d_out, packed),
        facts(facts),
        d_key_mass(static_cast<const float*>(g.d_key_mass)),
        dim(static_cast<int>(p.dim)),
        value_dim(static_cast<int>(p.value_dim)),
        dropout(p.dropout > 0) {}
};

// dbias (attention_bias_gradient.cu).
void bias_gradient(const CudaStream& stream, const Problem& p, const Backward& in,
                   const Operand& dbias);

// The facts of one sequence and head.
struct HeadFacts {
  const float *base, *low, *delta;
  const float* d_key_mass;  // or null

  __device__ HeadFacts(const RowFacts& facts, int64_t row_at, const float* d_key_mass,
                       int64_t key_at)
      : base(facts.base + row_at),
        low(facts.low + row_at),
        delta(facts.delta + row_at),
        d_key_mass(d_key_mass ? d_key_mass + key_at : nullptr) {}
};

// c: <q_i, k_j> becomes p_ij, 0 where dropped. d: <do_i, v_j> becomes dx_ij, or ds_ij where not
// kCapped. sums: + ds of the own rows, of this lane's columns.
template <class T, bool kByKeys, bool kCapped, int kM, int kN>
__device__ void score_gradients(const HeadRules& head, const HeadFacts& facts, bool dropout,
                                bool whole, uint64_t seen, int own, int other,
                                float (&c)[kM][kN][4], float (&d)[kM][kN][4],
                                float (&sums)[2 * kM]) {
  const Rules& rules = head.rules;
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  const bool plain = whole && !rules.modify() && !dropout && !facts.d_key_mass;
  const bool with_low = !plain || sizeof(T) == 4;
  const uint64_t kept = dropout ? kept_bits<kByKeys, kM, kN>(head, own, other) : ~uint64_t{0};
  float base[2 * kM], low[2 * kM], delta[2 * kM];  // of the own queries
#pragma unroll
  for (int m = 0; m < 2 * kM; ++m) {
    const int i = own + m * 8 + g;
    const bool inside = !kByKeys && i < head.q_len;
    base[m] = inside ? facts.base[i] : infinity();
    low[m] = inside && with_low ? facts.low[i] : 0.0f;
    delta[m] = inside ? facts.delta[i] : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int column = other + n * 8 + 2 * t + r;
      float column_base = infinity(), column_low = 0.0f, column_delta = 0.0f;
      if (kByKeys && column < head.q_len) {
        column_base = facts.base[column];
        if (with_low) column_low = facts.low[column];
        column_delta = facts.delta[column];
      }
#pragma unroll
      for (int m = 0; m < 2 * kM; ++m) {
        float &x = c[m / 2][n][m % 2 * 2 + r], &dx = d[m / 2][n][m % 2 * 2 + r];
        const float row_base = kByKeys ? column_base : base[m];
        const float row_low = kByKeys ? column_low : low[m];
        const float row_delta = kByKeys ? column_delta : delta[m];
        if (plain) {
          const float above = x * rules.scale_log2 - row_base;
          x = exp2_of<T>(sizeof(T) == 4 ? above - row_low : above);
          dx = x * (dx - row_delta);
          sums[m] += dx;
          continue;
        }
        const int e = (m / 2 * kN + n) * 4 + m % 2 * 2 + r;
        if (!(seen >> e & 1) || row_low == infinity()) {
          x = dx = 0.0f;
          continue;
        }
        const int row = own + m * 8 + g;
        const int i = kByKeys ? column : row, j = kByKeys ? row : column;
        float cap;
        const float score = head.score(x, i, j, &cap);
        const float p = exp2_of<T>(score - row_base - row_low);
        x = kept >> e & 1 ? p : 0.0f;
        float a = kept >> e & 1 ? dx * rules.keep_scale : 0.0f;
        if (facts.d_key_mass) a += facts.d_key_mass[j];
        dx = p * (a - row_delta);
        sums[m] += dx;
        if (kCapped) dx *= cap;
      }
    }
}

}  // namespace pentad::attention::cuda
