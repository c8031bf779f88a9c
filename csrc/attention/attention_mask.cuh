// SPDX-License-Identifier: Apache-2.0
// From products to scores, on a device: which keys a query sees, what is added, and what dropout
// keeps (attention.h). Scores are in units of log2, so that a probability is one exp2.
#pragma once
#include <cmath>

#include "attention/attention.h"
#include "common/cuda_launch.cuh"

namespace pentad::attention::cuda {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kMostScore = 1e10f;  // of finite ones that something was added to

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// --- One number of any dtype ------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// --- The options of a problem -----------------------------------------------------------------------

// Plain numbers and pointers into the device's memory, for a kernel's parameters.
struct Rules {
  float scale, scale_log2, softcap;
  int64_t left, right;
  bool top_left;
  const void* bias;
  DType bias_dtype;
  int64_t bias_stride[4];
  const float* key_bias;
  int64_t key_bias_stride[3];
  int heads_per_key_bias;
  const float* alibi;
  int64_t alibi_stride[2];
  const float* sink;
  uint64_t seed;
  int64_t first_stream;
  uint32_t drop_below;  // of the random word
  float keep_scale;     // 1 / (1 - dropout)
  int heads, group;
  BlockMask mask;

  explicit Rules(const Problem& p, bool packed = false)
      : scale(static_cast<float>(p.scale)),
        scale_log2(static_cast<float>(p.scale / kLn2)),
        softcap(static_cast<float>(p.softcap)),
        left(p.left),
        right(p.right),
        top_left(p.top_left),
        bias(p.bias.data),
        bias_dtype(p.bias.dtype),
        key_bias(static_cast<const float*>(p.key_bias)),
        heads_per_key_bias(static_cast<int>(p.key_bias ? p.heads / p.key_bias_heads : 1)),
        alibi(static_cast<const float*>(p.alibi)),
        sink(static_cast<const float*>(p.sink)),
        seed(p.seed),
        first_stream(p.first_stream),
        drop_below(static_cast<uint32_t>(min(std::ceil(p.dropout * 0x1p32), 0x1p32 - 1))),
        keep_scale(static_cast<float>(1 / (1 - p.dropout))),
        heads(static_cast<int>(p.heads)),
        group(static_cast<int>(p.group())) {
    for (int i = 0; i < 4; ++i) bias_stride[i] = p.bias.stride[i];
    for (int i = 0; i < 3; ++i) key_bias_stride[i] = p.key_bias_stride[i];
    for (int i = 0; i < 2; ++i) alibi_stride[i] = p.alibi_stride[i];
    if (packed) key_bias_stride[0] = 0;
    if (p.mask) mask = *p.mask;
  }

  __host__ __device__ bool adds_numbers() const { return bias && bias_dtype != DType::boolean; }
  // Whether a score is more than its scaled product.
  __host__ __device__ bool modify() const {
    return softcap > 0 || adds_numbers() || key_bias || alibi;
  }
  // Whether more than a window says what is seen.
  __host__ __device__ bool choose() const {
    return mask.row_ptr || (bias && bias_dtype == DType::boolean);
  }
};

// --- Of one sequence and head -----------------------------------------------------------------------

enum class Seen { none, some, all };

// Everything the scores of sequence b and head h need beside the products.
struct HeadRules {
  const Rules& rules;
  int q_len, k_len, offset;
  int64_t bias_at;        // of element (b, h, 0, 0)
  const float* key_bias;  // of key 0
  float slope;
  uint32_t stream;
  const int64_t* row_ptr;  // of the block mask

  __device__ HeadRules(const Rules& rules, int b, int h, int q_len, int k_len, int64_t k_begin)
      : rules(rules),
        q_len(q_len),
        k_len(k_len),
        offset(rules.top_left ? 0 : k_len - q_len),
        bias_at(b * rules.bias_stride[0] + h * rules.bias_stride[1]),
        key_bias(rules.key_bias ? rules.key_bias + b * rules.key_bias_stride[0] +
                                      h / rules.heads_per_key_bias * rules.key_bias_stride[1] +
                                      k_begin * rules.key_bias_stride[2]
                                : nullptr),
        slope(rules.alibi ? rules.alibi[b * rules.alibi_stride[0] + h * rules.alibi_stride[1]]
                          : 0.0f),
        stream(static_cast<uint32_t>(rules.first_stream + int64_t{b} * rules.heads + h)) {
    const BlockMask& m = rules.mask;
    const int64_t pair = (m.batch == 1 ? 0 : b) * m.heads + (m.heads == 1 ? 0 : h);
    row_ptr = m.row_ptr ? m.row_ptr + pair * (m.q_blocks + 1) : nullptr;
  }

  // Keys [*first, *last] that the window lets query i see; none where first > last.
  __device__ void keys_of(int i, int* first, int* last) const {
    const int64_t at = int64_t{i} + offset;
    *first = static_cast<int>(max(int64_t{0}, min(at - rules.left, int64_t{k_len})));
    *last = i < q_len ? static_cast<int>(min(k_len - int64_t{1}, at + rules.right)) : -1;
  }
  // Queries that the window lets see key j.
  __device__ void queries_of(int j, int* first, int* last) const {
    const int64_t at = int64_t{j} - offset;
    *first = static_cast<int>(max(int64_t{0}, min(at - rules.right, int64_t{q_len})));
    *last = j < k_len ? static_cast<int>(max(int64_t{-1}, min(q_len - int64_t{1}, at + rules.left)))
                      : -1;
  }

  // What is seen in queries [i0, i1) and keys [j0, j1), which may end past the lengths.
  __device__ Seen classify(int i0, int i1, int j0, int j1) const {
    bool all = i1 <= q_len && j1 <= k_len;
    const int64_t i_last = min(i1, q_len) - 1, j_last = min(j1, k_len) - 1;
    if (j_last < i0 + offset - rules.left || j0 > i_last + offset + rules.right) return Seen::none;
    all = all && j0 >= i_last + offset - rules.left && j_last <= i0 + offset + rules.right;
    if (rules.bias && rules.bias_dtype == DType::boolean) all = false;
    if (!row_ptr) return all ? Seen::all : Seen::some;
    const BlockMask& m = rules.mask;
    const auto first = static_cast<int>(j0 / m.k_block),
               last = static_cast<int>(j_last / m.k_block);
    bool any = false;
    for (auto row = static_cast<int>(i0 / m.q_block); row <= i_last / m.q_block; ++row) {
      int64_t n = block_entry(row, first);
      int full = 0;
      for (; n < row_ptr[row + 1] && m.cols[n] <= last; ++n) {
        any = true;
        full += m.kinds[n] < 0;
      }
      all = all && full == last - first + 1;
    }
    return !any ? Seen::none : all ? Seen::all : Seen::some;
  }

  // The first entry of a row of blocks whose column is at least `column`.
  __device__ int64_t block_entry(int row, int column) const {
    int64_t low = row_ptr[row], high = row_ptr[row + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (rules.mask.cols[middle] < column) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // What the block mask and a boolean bias say of (i, j), both within the lengths.
  __device__ bool chooses(int i, int j) const {
    if (rules.bias && rules.bias_dtype == DType::boolean &&
        !static_cast<const uint8_t*>(
            rules.bias)[bias_at + i * rules.bias_stride[2] + j * rules.bias_stride[3]])
      return false;
    if (!row_ptr) return true;
    const BlockMask& m = rules.mask;
    const auto row = static_cast<int>(i / m.q_block), column = static_cast<int>(j / m.k_block);
    const int64_t n = block_entry(row, column);
    if (n == row_ptr[row + 1] || m.cols[n] != column) return false;
    const int64_t kind = m.kinds[n];
    return kind < 0 || m.partial[(kind * m.q_block + i % m.q_block) * m.k_block + j % m.k_block];
  }

  // The score in units of log2 of a product of a query and a key that it sees; `cap` becomes the
  // derivative of the soft cap.
  __device__ float score(float product, int i, int j, float* cap) const {
    *cap = 1.0f;
    if (!rules.modify()) return product * rules.scale_log2;
    float x = product * rules.scale;
    if (rules.softcap > 0) {
      const float t = tanhf(x / rules.softcap);
      x = rules.softcap * t;
      *cap = 1.0f - t * t;
    }
    if (rules.adds_numbers()) {
      const int64_t at = bias_at + i * rules.bias_stride[2] + j * rules.bias_stride[3];
      if (rules.bias_dtype == DType::f32) x += static_cast<const float*>(rules.bias)[at];
      else if (rules.bias_dtype == DType::bf16)
        x += to_float(static_cast<const __nv_bfloat16*>(rules.bias)[at]);
      else x += to_float(static_cast<const __half*>(rules.bias)[at]);
    }
    if (key_bias) x += key_bias[j * rules.key_bias_stride[2]];
    if (rules.alibi) x -= slope * static_cast<float>(abs(i + offset - j));
    if (x > kMostScore && x < infinity()) x = kMostScore;
    if (x < -kMostScore && x > -infinity()) x = -kMostScore;
    return x * kLog2e;
  }
};

// --- Dropout ----------------------------------------------------------------------------------------

// attention::philox on a device.
struct Words {
  uint32_t word[4];
};
__device__ inline Words random_words(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Bit n: whether dropout keeps (i, j - j % 4 + n).
__device__ inline uint32_t kept_of_four(const HeadRules& head, int i, int j) {
  const Words bits = random_words(head.rules.seed, static_cast<uint32_t>(j / 4),
                                  static_cast<uint32_t>(i), head.stream);
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) kept |= (bits.word[n] >= head.rules.drop_below ? 1u : 0u) << n;
  return kept;
}

}  // namespace pentad::attention::cuda
