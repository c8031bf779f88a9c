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
  static constexpr int kSpare = kLanes * kM * kOther / 2;  // twice
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

  // Whether a gradient is more than p (<do, v> - delta) of the scaled product's p.
  __host__ __device__ bool special() const { return rules.modify() || dropout || d_key_mass; }
  template <class Shape>
  size_t shared() const {
    return Shape::kShared + (special() ? 2 * shared_bytes<float>(Shape::kSpare) : 0);
  }
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
// kCapped. sums: + ds of the own rows, of this lane's columns. spare: twice (4 kM kN, lanes) in shared
// memory where the gradient is special.
template <class T, bool kByKeys, bool kCapped, int kM, int kN>
__device__ void score_gradients(const HeadRules& head, const HeadFacts& facts, bool special,
                                bool dropout, bool whole, uint64_t seen, int own, int other,
                                float (&c)[kM][kN][4], float (&d)[kM][kN][4], float (&sums)[2 * kM],
                                float* spare) {
  const Rules& rules = head.rules;
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  if (special) {
    float* spare_d = spare + kM * kN * 4 * blockDim.x;
    const uint64_t kept = dropout ? kept_bits<kByKeys, kM, kN>(head, own, other) : ~uint64_t{0};
    stow(c, spare);
    stow(d, spare_d);
#pragma unroll 1
    for (int e = 0; e < kM * kN * 4; ++e) {
      const Pair<kByKeys, kN> at(e, own, other);
      float &x = spare[e * blockDim.x + threadIdx.x], &dx = spare_d[e * blockDim.x + threadIdx.x];
      float ds = 0.0f;
      if (!(seen >> e & 1) || facts.low[at.i] == infinity()) {
        x = dx = 0.0f;
      } else {
        float cap;
        const float score = head.score(x, at.i, at.j, &cap);
        const float p = exp2_of<T>(score - facts.base[at.i] - facts.low[at.i]);
        const bool keep = kept >> e & 1;
        float a = keep ? dx * rules.keep_scale : 0.0f;
        if (facts.d_key_mass) a += facts.d_key_mass[at.j];
        ds = p * (a - facts.delta[at.i]);
        x = keep ? p : 0.0f;
        dx = kCapped ? ds * cap : ds;
      }
#pragma unroll
      for (int m = 0; m < 2 * kM; ++m)
        if (m == e / (4 * kN) * 2 + e % 4 / 2) sums[m] += ds;
    }
    fetch(c, spare);
    fetch(d, spare_d);
    return;
  }

  const bool with_low = !whole || sizeof(T) == 4;
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
        const float row_low = kByKeys ? column_low : low[m];
        const int e = (m / 2 * kN + n) * 4 + m % 2 * 2 + r;
        // A row without any weight has no gradient, whatever its values hold.
        const bool counts = whole || ((seen >> e & 1) && row_low < infinity());
        const float above = x * rules.scale_log2 - (kByKeys ? column_base : base[m]);
        const float p = exp2_of<T>(with_low ? above - row_low : above);
        x = counts ? p : 0.0f;
        dx = counts ? p * (dx - (kByKeys ? column_delta : delta[m])) : 0.0f;
        sums[m] += dx;
      }
    }
}

}  // namespace pentad::attention::cuda
