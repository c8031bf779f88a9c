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
#include <atomic>

#include "attention/attention_hopper.cuh"
#include "common/ceil_div.h"

namespace pentad::attention::cuda {
namespace {

constexpr int kKeys = 128;  // of a tile

struct Task {
  Window window;
  int64_t q_tiles, heads, group;
  float scale;  // log2(e) times the problem's
  void* out;
  int64_t out_stride[4];
  Logs lse;  // its data may be null
};

template <int D>
struct Memory {
  using Rows = Tile<kBlockRows, D>;
  using Keys = Tile<kKeys, D>;
  static constexpr size_t kBytes = shared_bytes<uint16_t[Rows::kSize], 1024>(1) +
                                   shared_bytes<uint16_t[Keys::kSize], 1024>(2 * kStages) +
                                   shared_bytes<Barrier>(1 + 4 * kStages);
  uint16_t* q;
  uint16_t (*k)[Keys::kSize], (*v)[Keys::kSize];  // by stages
  Barrier *q_full, *k_full, *k_empty, *v_full, *v_empty;

  __device__ Memory() {
    Shared shared;
    q = shared.take<uint16_t[Rows::kSize], 1024>(1)[0];
    k = shared.take<uint16_t[Keys::kSize], 1024>(2 * kStages);
    v = k + kStages;
    q_full = shared.take<Barrier>(1 + 4 * kStages);
    k_full = q_full + 1;
    k_empty = k_full + kStages;
    v_full = k_empty + kStages;
    v_empty = v_full + kStages;
    if (threadIdx.x == 0) {
      q_full->init(1);
      for (int i = 0; i < kStages; ++i) {
        k_full[i].init(1);
        v_full[i].init(1);
        k_empty[i].init(kConsumerWarps);
        v_empty[i].init(kConsumerWarps);
      }
    }
    hopper::publish_barriers();
  }
};

// 64 queries of a consumer: what a lane has of its two rows.
template <bool bf16, int D>
struct Consumer {
  using Rows = typename Memory<D>::Rows;
  using Keys = typename Memory<D>::Keys;
  const Task& task;
  const Memory<D>& memory;
  const int64_t q_first;
  const Place place;
  float scores[kKeys / 2], out[D / 2] = {};
  uint32_t weights[kKeys / 16][4];
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of a row so far; sums of the lane

  __device__ Consumer(const Task& task, const Memory<D>& memory, int64_t q_first)
      : task(task), memory(memory), q_first(q_first) {}

  // S = Q K^T of the n-th tile, begun.
  __device__ void begin_scores(int n) {
    const Use use(n);
    memory.k_full[use.stage].wait(use.parity);
    hopper::hold(scores);
    hopper::begin();
#pragma unroll
    for (int d = 0; d < D; d += 16)
      hopper::product<bf16>(scores, Rows::rows(memory.q, d, place.warpgroup * kConsumerRows),
                            Keys::rows(memory.k[use.stage], d), d > 0);
    hopper::commit();
  }
  // O += P V of the n-th tile, begun.
  __device__ void begin_outputs(int n) {
    const Use use(n);
    memory.v_full[use.stage].wait(use.parity);
    hopper::hold(out);
    hopper::begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      hopper::product<bf16, true>(out, weights[k], Keys::columns(memory.v[use.stage], k * 16));
    hopper::commit();
  }
  __device__ void finish_outputs(int n) {
    hopper::hold(out);
    release(memory.v_empty, n);
  }
  __device__ void release(Barrier* empty, int n) const {
    if (lane_of_warp() == 0) empty[Use(n).stage].arrive();
  }

  // The weights of the n-th tile, whose first key this is, when its scores are there.
  __device__ void soften(int n, int64_t key, float (&scaled)[2]) {
    hopper::hold(scores);
    release(memory.k_empty, n);
    // The block's queries see all keys of a tile, but for those at the ends.
    if (key + kKeys - 1 > task.window.last_key(q_first) ||
        key < task.window.first_key(q_first + kBlockRows - 1))
      mask(scores, place, [&](int row) { return task.window.keys_of(q_first + row, key); });
    exponentiate(scaled);
  }

  // Scores to weights in place; renews `most` and `sum`, and says by what older sums are to be scaled.
  __device__ void exponentiate(float (&scaled)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = most[half];
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 2 % 2 == half) best = fmaxf(best, scores[i] * task.scale);
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 1));
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2));
      const float from = best == -INFINITY ? 0.0f : best;  // no key yet: weights of 0
      scaled[half] = exp2f(most[half] - from);
      most[half] = best;
      float total = sum[half] * scaled[half];
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 2 % 2 == half) {
          scores[i] = exp2f(scores[i] * task.scale - from);
          total += scores[i];
        }
      sum[half] = total;
    }
  }
  __device__ void scale_outputs(const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= by[i / 2 % 2];
  }

  __device__ void write(int64_t head, int64_t batch) {
    float by[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      by[half] = total == 0 ? 0.0f : 1 / total;
      const int64_t query = q_first + place.row + half * 8;
      if (task.lse.data && place.t == 0 && query < task.window.sq)
        task.lse.set(batch, head, query,
                     total == 0 ? -INFINITY : (most[half] + log2f(total)) * kLn2);
    }
    auto* to =
        static_cast<uint16_t*>(task.out) + batch * task.out_stride[0] + head * task.out_stride[1];
    store_rows<bf16, D>(out, by, place, to, q_first, task.window.sq, task.out_stride[2]);
  }
};

// q (B, Hq, Sq, D), k and v (B, Hk, Sk, D) -> out (B, Hq, Sq, D), lse (B, Hq, Sq).
template <bool bf16, int D>
__global__ void __launch_bounds__(kLanes, 1)
    hopper_forward_kernel(const __grid_constant__ TileMap q_map,
                          const __grid_constant__ TileMap k_map,
                          const __grid_constant__ TileMap v_map,
                          const __grid_constant__ Task task) {
  using Rows = typename Memory<D>::Rows;
  using Keys = typename Memory<D>::Keys;
  const Memory<D> memory;
  // The last queries first: where attention is causal they take longest.
  const int64_t q_first = (task.q_tiles - 1 - blockIdx.x % task.q_tiles) * kBlockRows;
  const int64_t head = blockIdx.x / task.q_tiles % task.heads;
  const int64_t batch = blockIdx.x / task.q_tiles / task.heads;
  const int64_t q_last = min(q_first + kBlockRows, task.window.sq) - 1;
  const Tiles tiles(task.window.first_key(q_first), task.window.last_key(q_last), kKeys);

  if (threadIdx.x < 128) {
    hopper::fewer_registers<24>();
    if (threadIdx.x != 0 || tiles.count == 0) return;
    memory.q_full->arrive_expecting(Rows::kBytes);
    Rows::copy(memory.q, q_map, memory.q_full, q_first, head, batch);
    for (int n = 0; n < tiles.count; ++n) {
      const Use use(n);
      const int64_t key = (tiles.first + n) * kKeys, kv_head = head / task.group;
      memory.k_empty[use.stage].wait(1 - use.parity);
      memory.k_full[use.stage].arrive_expecting(Keys::kBytes);
      Keys::copy(memory.k[use.stage], k_map, &memory.k_full[use.stage], key, kv_head, batch);
      memory.v_empty[use.stage].wait(1 - use.parity);
      memory.v_full[use.stage].arrive_expecting(Keys::kBytes);
      Keys::copy(memory.v[use.stage], v_map, &memory.v_full[use.stage], key, kv_head, batch);
    }
  } else {
    hopper::more_registers<240>();
    Consumer<bf16, D> consumer(task, memory, q_first);
    if (tiles.count > 0) {
      float scaled[2];
      memory.q_full->wait(0);
      consumer.begin_scores(0);
      hopper::wait<0>();
      consumer.soften(0, tiles.first * kKeys, scaled);
      to_operand<bf16>(consumer.scores, consumer.weights);
      for (int n = 1; n < tiles.count; ++n) {
        consumer.begin_scores(n);
        consumer.begin_outputs(n - 1);
        hopper::wait<1>();
        consumer.soften(n, (tiles.first + n) * kKeys, scaled);
        hopper::wait<0>();
        consumer.finish_outputs(n - 1);
        consumer.scale_outputs(scaled);
        to_operand<bf16>(consumer.scores, consumer.weights);
      }
      consumer.begin_outputs(tiles.count - 1);
      hopper::wait<0>();
      consumer.finish_outputs(tiles.count - 1);
    }
    consumer.write(head, batch);
  }
}

template <bool bf16, int D>
void launch_forward(const CudaStream& stream, const Problem& p, const Task& task) {
  const Grid grid{blocks_of(task.q_tiles * p.heads * p.batch), kLanes, Memory<D>::kBytes};
  launch(stream, "attention: forward", hopper_forward_kernel<bf16, D>, grid,
         tile_map(Shape(p.q, p.batch, p.heads, p.max_q, D), kBlockRows),
         tile_map(Shape(p.k, p.batch, p.kv_heads, p.max_k, D), kKeys),
         tile_map(Shape(p.v, p.batch, p.kv_heads, p.max_k, D), kKeys), task);
}

std::atomic<bool> wanted = false;

bool takes_inputs(const Problem& p) {
  const bool plain = p.q_begin.empty() && p.k_begin.empty() && p.k_length.empty() &&
                     p.cache_row.empty() && p.left_pad.empty() && p.block_table.empty() &&
                     p.softcap == 0 && !p.bias.data && !p.key_bias && !p.alibi && !p.sink &&
                     p.dropout == 0 && !p.mask && p.scale > 0;
  return plain && (p.dim == 64 || p.dim == 128) && p.value_dim == p.dim &&
         (p.q.dtype == DType::bf16 || p.q.dtype == DType::f16) &&
         can_tile(Shape(p.q, p.batch, p.heads, p.max_q, p.dim)) &&
         can_tile(Shape(p.k, p.batch, p.kv_heads, p.max_k, p.dim)) &&
         can_tile(Shape(p.v, p.batch, p.kv_heads, p.max_k, p.dim));
}
}  // namespace

bool hopper_wanted(int device) { return wanted && hopper::runs_on(device); }
void want_hopper(bool now) { wanted = now; }

bool hopper_takes(const Problem& p, const Outputs& to) {
  return takes_inputs(p) && can_store(to.out) && !to.key_mass && (!to.lse.data || is_logs(to.lse));
}

void hopper_forward(const CudaStream& stream, const Problem& p, const Outputs& to) {
  Task task{Window(p),
            ceil_div(p.max_q, int64_t{kBlockRows}),
            p.heads,
            p.group(),
            static_cast<float>(p.scale * kLog2e),
            to.out.data,
            {},
            Logs(to.lse)};
  for (int i = 0; i < 4; ++i) task.out_stride[i] = to.out.stride[i];
  with_types(p, [&](auto bf16, auto dim) { launch_forward<bf16(), dim()>(stream, p, task); });
}

}  // namespace pentad::attention::cuda
