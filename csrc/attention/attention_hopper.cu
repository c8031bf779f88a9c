// SPDX-License-Identifier: Apache-2.0
// FlashAttention-3's shape (Shah et al. 2024, "FlashAttention-3: Fast and accurate attention with
// asynchrony and low-precision", sections 3.1 and 3.2): one warpgroup copies tiles, two multiply.
//
// A block takes 128 queries of one head. Its producer keeps two tiles of 128 keys and two of values
// on their way; each consumer has 64 of the queries. While the tensor cores multiply the weights of
// one tile by its values and the queries by the next keys, the consumer exponentiates:
//
//   S_j = Q K_j^T                   begun before P_j-1 V_j-1, so that both run
//   O += P_j-1 V_j-1
//   P_j = exp2(S_j - m_j)           while the other consumer's products run
//   O *= exp2(m_j-1 - m_j)
//
// Limit: products, 4 Sq Sk D a head (half of it where causal), and beside them one exponential for
// 4 D of their operations: 16 a cycle and multiprocessor, against 4096 operations. Shared memory at
// D 128: 160 KB, one block a multiprocessor; registers: 64 scores, 64 outputs and 32 weights a lane.
#include "attention/attention_hopper.h"
#include "common/ceil_div.h"
#include "common/hopper.cuh"
#include "common/mma.cuh"

namespace pentad::attention::cuda {
namespace {

using hopper::Barrier;
using hopper::kPanel;
using hopper::TileMap;

constexpr int kQueries = 128, kKeys = 128, kStages = 2;
constexpr int kLanes = 3 * 128, kConsumerWarps = 8;
constexpr float kLn2 = 0.6931471805599453f;

struct Task {
  int64_t q_tiles, heads, group, sq, sk, offset, left, right;
  float scale;  // log2(e) times the problem's
  void* out;
  int64_t out_stride[4];
  float* lse;  // may be null
  int64_t lse_stride[3];
};

// The tiles of keys that some query of the tile sees: [first, last).
struct KeyTiles {
  int first, last;
  __device__ KeyTiles(const Task& task, int64_t q_first) {
    const int64_t q_last = min(q_first + kQueries, task.sq) - 1;
    const int64_t low = max(int64_t{0}, q_first + task.offset - task.left);
    const int64_t high = min(task.sk, q_last + task.offset + task.right + 1);
    first = static_cast<int>(low / kKeys);
    last = high > low ? static_cast<int>((high + kKeys - 1) / kKeys) : first;
  }
};

template <int D>
struct Memory {
  static constexpr int kPanels = D / kPanel, kTile = kKeys * D, kPart = kKeys * kPanel;
  static constexpr size_t kBytes =
      shared_bytes<uint16_t[kTile], 1024>(1 + 2 * kStages) + shared_bytes<Barrier>(1 + 4 * kStages);
  uint16_t *q, *k, *v;  // panels of 64 columns, one behind the other; k and v in stages
  Barrier *q_full, *k_full, *k_empty, *v_full, *v_empty;

  __device__ Memory() {
    Shared shared;
    q = shared.take<uint16_t, 1024>(kTile * (1 + 2 * kStages));
    k = q + kTile;
    v = k + kStages * kTile;
    q_full = shared.take<Barrier>(1 + 4 * kStages);
    k_full = q_full + 1;
    k_empty = k_full + kStages;
    v_full = k_empty + kStages;
    v_empty = v_full + kStages;
  }
  // A tile of 128 rows, panel by panel.
  __device__ static void copy(uint16_t* tile, const TileMap& map, Barrier* full, int64_t row,
                              int64_t head, int64_t batch) {
    full->arrive_expecting(kTile * 2);
    for (int p = 0; p < kPanels; ++p)
      hopper::copy_tile(tile + p * kPart, map, full, p * kPanel, static_cast<int>(row),
                        static_cast<int>(head), static_cast<int>(batch));
  }
};

// The stage of the n-th tile, and the parity of its use.
struct Use {
  int stage, parity;
  __device__ explicit Use(int n) : stage(n % kStages), parity(n / kStages % 2) {}
};

template <bool bf16>
__device__ uint32_t pair_of(float low, float high) {
  return bf16 ? bf16_pair(low, high) : f16_pair(low, high);
}

// 64 queries of a consumer: what the lane has of its rows g and g + 8.
template <bool bf16, int D>
struct Consumer {
  static constexpr int kScores = kKeys / 2, kOutputs = D / 2;
  const Task& task;
  const Memory<D>& memory;
  int warpgroup, warp, lane, t;
  int64_t q_first;
  int64_t row;  // the first of its two, row + 8 is the other
  float scores[kScores], out[kOutputs] = {};
  uint32_t weights[kKeys / 16][4];
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of a row so far; sums of the lane

  __device__ Consumer(const Task& task, const Memory<D>& memory, int64_t q_first)
      : task(task),
        memory(memory),
        warpgroup(static_cast<int>(threadIdx.x) / 128 - 1),
        warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(lane_of_warp()),
        t(lane % 4),
        q_first(q_first),
        row(q_first + warpgroup * 64 + warp * 16 + lane / 4) {}

  // S = Q K^T of the n-th tile, begun.
  __device__ void begin_scores(int n) {
    const Use use(n);
    memory.k_full[use.stage].wait(use.parity);
    const uint16_t* keys = memory.k + use.stage * Memory<D>::kTile;
    hopper::hold(scores);
    hopper::begin();
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const int at = d / kPanel * Memory<D>::kPart;
      const hopper::Operand q(memory.q + at + warpgroup * 64 * kPanel, 1024), k(keys + at, 1024);
      hopper::product<bf16>(scores, q.advanced(d % kPanel * 2), k.advanced(d % kPanel * 2), d > 0);
    }
    hopper::commit();
  }
  // O += P V of the n-th tile, begun.
  __device__ void begin_outputs(int n) {
    const Use use(n);
    memory.v_full[use.stage].wait(use.parity);
    const hopper::Operand v(memory.v + use.stage * Memory<D>::kTile, 1024, Memory<D>::kPart * 2);
    hopper::hold(out);
    hopper::begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      hopper::product<bf16, true>(out, weights[k], v.advanced(k * 16 * kPanel * 2));
    hopper::commit();
  }
  __device__ void finish_outputs(int n) {
    hopper::hold(out);
    release(memory.v_empty, n);
  }
  __device__ void release(Barrier* empty, int n) const {
    if (lane == 0) empty[Use(n).stage].arrive();
  }

  // The weights of the n-th tile, when its scores are there.
  __device__ void soften(const KeyTiles& tiles, int n, float (&scaled)[2]) {
    hopper::hold(scores);
    release(memory.k_empty, n);
    const int64_t key = int64_t{tiles.first + n} * kKeys;
    // The block's queries see all keys of a tile, but for those at the ends.
    if (key + kKeys > task.sk || key + kKeys - 1 > q_first + task.offset + task.right ||
        key < q_first + kQueries - 1 + task.offset - task.left)
      mask(key);
    exponentiate(scaled);
  }

  // Keys from `key` on that a row does not see count as -inf.
  __device__ void mask(int64_t key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + half * 8 + task.offset;
      const int64_t low = at - task.left - key, high = min(task.sk - 1, at + task.right) - key;
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) {
        const int column = i / 2 * 8 + t * 2 + i % 2;
        if (column < low || column > high) scores[i / 2 * 4 + half * 2 + i % 2] = -INFINITY;
      }
    }
  }

  // Scores to weights in place; fixes `most` and `sum`, and says by what older sums are to be scaled.
  __device__ void exponentiate(float (&scaled)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = most[half];
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i)
        best = fmaxf(best, scores[i / 2 * 4 + half * 2 + i % 2] * task.scale);
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 1));
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2));
      const float from = best == -INFINITY ? 0.0f : best;  // no key yet: weights of 0
      scaled[half] = exp2f(most[half] - from);
      most[half] = best;
      float total = sum[half] * scaled[half];
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) {
        float& score = scores[i / 2 * 4 + half * 2 + i % 2];
        score = exp2f(score * task.scale - from);
        total += score;
      }
      sum[half] = total;
    }
  }
  __device__ void to_weights() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[k][i] = pair_of<bf16>(scores[k * 8 + i * 2], scores[k * 8 + i * 2 + 1]);
  }
  __device__ void scale_outputs(const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) out[i] *= by[i % 4 / 2];
  }

  __device__ void write(int64_t head, int64_t batch) {
    auto* to =
        static_cast<uint16_t*>(task.out) + batch * task.out_stride[0] + head * task.out_stride[1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      const int64_t i = row + half * 8;
      if (i >= task.sq) continue;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float* pair = &out[n * 4 + half * 2];
        const uint32_t both =
            pair_of<bf16>(total == 0 ? 0.0f : pair[0] / total, total == 0 ? 0.0f : pair[1] / total);
        *reinterpret_cast<uint32_t*>(to + i * task.out_stride[2] + n * 8 + t * 2) = both;
      }
      if (task.lse && t == 0)
        task.lse[batch * task.lse_stride[0] + head * task.lse_stride[1] + i * task.lse_stride[2]] =
            total == 0 ? -INFINITY : (most[half] + log2f(total)) * kLn2;
    }
  }
};

// q (B, Hq, Sq, D), k and v (B, Hk, Sk, D) -> out (B, Hq, Sq, D), lse (B, Hq, Sq).
template <bool bf16, int D>
__global__ void __launch_bounds__(kLanes, 1)
    hopper_kernel(const __grid_constant__ TileMap q_map, const __grid_constant__ TileMap k_map,
                  const __grid_constant__ TileMap v_map, const __grid_constant__ Task task) {
  const Memory<D> memory;
  if (threadIdx.x == 0) {
    memory.q_full->init(1);
    for (int i = 0; i < kStages; ++i) {
      memory.k_full[i].init(1);
      memory.v_full[i].init(1);
      memory.k_empty[i].init(kConsumerWarps);
      memory.v_empty[i].init(kConsumerWarps);
    }
  }
  hopper::publish_barriers();

  // The last queries first: where attention is causal they take longest.
  const int64_t tile = task.q_tiles - 1 - blockIdx.x % task.q_tiles;
  const int64_t head = blockIdx.x / task.q_tiles % task.heads;
  const int64_t batch = blockIdx.x / task.q_tiles / task.heads;
  const int64_t q_first = tile * kQueries;
  const KeyTiles tiles(task, q_first);
  const int count = tiles.last - tiles.first;

  if (threadIdx.x < 128) {
    hopper::fewer_registers<24>();
    if (threadIdx.x != 0 || count == 0) return;
    const int64_t kv_head = head / task.group;
    Memory<D>::copy(memory.q, q_map, memory.q_full, q_first, head, batch);
    for (int n = 0; n < count; ++n) {
      const Use use(n);
      const int64_t key = int64_t{tiles.first + n} * kKeys;
      memory.k_empty[use.stage].wait(1 - use.parity);
      Memory<D>::copy(memory.k + use.stage * Memory<D>::kTile, k_map, &memory.k_full[use.stage],
                      key, kv_head, batch);
      memory.v_empty[use.stage].wait(1 - use.parity);
      Memory<D>::copy(memory.v + use.stage * Memory<D>::kTile, v_map, &memory.v_full[use.stage],
                      key, kv_head, batch);
    }
  } else {
    hopper::more_registers<240>();
    Consumer<bf16, D> consumer(task, memory, q_first);
    if (count > 0) {
      float scaled[2];
      memory.q_full->wait(0);
      consumer.begin_scores(0);
      hopper::wait<0>();
      consumer.soften(tiles, 0, scaled);
      consumer.to_weights();
      for (int n = 1; n < count; ++n) {
        consumer.begin_scores(n);
        consumer.begin_outputs(n - 1);
        hopper::wait<1>();
        consumer.soften(tiles, n, scaled);
        hopper::wait<0>();
        consumer.finish_outputs(n - 1);
        consumer.scale_outputs(scaled);
        consumer.to_weights();
      }
      consumer.begin_outputs(count - 1);
      hopper::wait<0>();
      consumer.finish_outputs(count - 1);
    }
    consumer.write(head, batch);
  }
}

// A (B, H, S, D) tensor as the copies have it: D, S, H, B.
TileMap map_of(const Operand& x, int64_t batch, int64_t heads, int64_t length, int64_t dim) {
  const int64_t size[4] = {dim, length, heads, batch};
  const int64_t stride[4] = {x.stride[3], x.stride[2], x.stride[1], x.stride[0]};
  return hopper::tile_map(x.data, size, stride, kKeys);
}
bool can_map(const Operand& x, int64_t batch, int64_t heads, int64_t length, int64_t dim) {
  const int64_t size[4] = {dim, length, heads, batch};
  const int64_t stride[4] = {x.stride[3], x.stride[2], x.stride[1], x.stride[0]};
  return hopper::can_tile(x.data, size, stride);
}

template <bool bf16, int D>
void launch_forward(const CudaStream& stream, const Problem& p, const Task& task) {
  const Grid grid{blocks_of(task.q_tiles * p.heads * p.batch), kLanes, Memory<D>::kBytes};
  launch(stream, "attention: hopper", hopper_kernel<bf16, D>, grid,
         map_of(p.q, p.batch, p.heads, p.max_q, D), map_of(p.k, p.batch, p.kv_heads, p.max_k, D),
         map_of(p.v, p.batch, p.kv_heads, p.max_k, D), task);
}

}  // namespace

bool hopper_takes(const Problem& p, const Outputs& to) {
  const bool plain = p.q_begin.empty() && p.k_begin.empty() && p.k_length.empty() &&
                     p.cache_row.empty() && p.left_pad.empty() && p.block_table.empty() &&
                     p.softcap == 0 && !p.bias.data && !p.key_bias && !p.alibi && !p.sink &&
                     p.dropout == 0 && !p.mask && !to.key_mass && p.scale > 0;
  const bool sizes = (p.dim == 64 || p.dim == 128) && p.value_dim == p.dim && p.max_q > 0 &&
                     p.max_k > 0 && p.batch > 0;
  const bool types = p.q.dtype == DType::bf16 || p.q.dtype == DType::f16;
  bool pairs = to.out.stride[3] == 1 && reinterpret_cast<uintptr_t>(to.out.data) % 4 == 0;
  for (int i = 0; i < 3; ++i) pairs = pairs && to.out.stride[i] % 2 == 0;
  return plain && sizes && types && pairs && (!to.lse.data || to.lse.dtype == DType::f32) &&
         can_map(p.q, p.batch, p.heads, p.max_q, p.dim) &&
         can_map(p.k, p.batch, p.kv_heads, p.max_k, p.dim) &&
         can_map(p.v, p.batch, p.kv_heads, p.max_k, p.dim);
}

void hopper_forward(const CudaStream& stream, const Problem& p, const Outputs& to) {
  Task task{};
  task.q_tiles = ceil_div(p.max_q, int64_t{kQueries});
  task.heads = p.heads;
  task.group = p.group();
  task.sq = p.max_q;
  task.sk = p.max_k;
  task.offset = p.offset(0);
  task.left = p.left;
  task.right = p.right;
  task.scale = static_cast<float>(p.scale * 1.4426950408889634);
  task.out = to.out.data;
  task.lse = static_cast<float*>(to.lse.data);
  for (int i = 0; i < 4; ++i) task.out_stride[i] = to.out.stride[i];
  for (int i = 0; i < 3; ++i) task.lse_stride[i] = to.lse.stride[i];
  const bool bf16 = p.q.dtype == DType::bf16;
  if (p.dim == 64)
    bf16 ? launch_forward<true, 64>(stream, p, task) : launch_forward<false, 64>(stream, p, task);
  else
    bf16 ? launch_forward<true, 128>(stream, p, task) : launch_forward<false, 128>(stream, p, task);
}

}  // namespace pentad::attention::cuda
