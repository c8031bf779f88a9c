// SPDX-License-Identifier: Apache-2.0
// The backward pass on Hopper, twice through the scores: once with the keys in place, for dK and dV, and
// once with the queries in place, for dQ, so that every sum has one owner and one order.
//
//   keys in place, S and dP with rows of keys        queries in place
//   P = exp2(S - lse), S = K Q^T                     P = exp2(S - lse), S = Q K^T
//   dV += P dO                                       dP = dO V^T
//   dP = V dO^T, dS = P (dP - delta)                 dS = P (dP - delta)
//   dK += dS Q                                       dQ += dS K
//
// P and dS go from the registers where they arise into the next product (FlashAttention-3 has one pass,
// whose dQ its blocks add up in memory: 5 products where these are 7, but in no fixed order).
//
// Limit: products, 14 Sq Sk D a head and half of it where causal; counted as 10, as is usual, 5/7 of
// the tensor cores' rate is the most. Shared memory at D 128: 128 KB; registers of the keys' pass: 128 of
// dK and dV, 64 of S and dP, 32 of P and dS.
#include "attention/attention_hopper.cuh"
#include "common/ceil_div.h"

namespace pentad::attention::cuda {
namespace {

// A row of lse and delta, to be subtracted.
struct Sums {
  float lse, delta;  // lse in base 2; +inf where the row has no weights
};

struct Task {
  Window window;
  int64_t tiles, heads, kv_heads, group;
  float scale, log2_scale;
  const Sums* sums;      // (B, Hq, Sq)
  void *first, *second;  // results of the rows in place: dQ; dK and dV
  int64_t first_stride[3], second_stride[3];

  __device__ const Sums* sums_of(int64_t batch, int64_t head) const {
    return sums + (batch * heads + head) * window.sq;
  }
};

struct Rows {
  const void* data;
  int64_t stride[4];
  explicit Rows(const Operand& x)
      : data(x.data), stride{x.stride[0], x.stride[1], x.stride[2], x.stride[3]} {}
  __device__ int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * stride[0] + h * stride[1] + i * stride[2];
  }
};

template <bool bf16>
__device__ float real_at(const void* data, int64_t i) {
  if constexpr (bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  else return __half2float(static_cast<const __half*>(data)[i]);
}

// out, d_out (B, Hq, Sq, D), lse, d_lse (B, Hq, Sq) -> sums (B, Hq, Sq): a warp for each row.
// Limit: memory, 4 D bytes a row.
template <bool bf16>
__global__ void __launch_bounds__(128)
    hopper_sums_kernel(Rows out, Rows d_out, Logs lse, Logs d_lse, int64_t count, int64_t heads,
                       int64_t sq, int dim, Sums* sums) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= count) return;
  const int64_t i = row % sq, h = row / sq % heads, b = row / sq / heads;
  float delta = 0;
  for (int d = lane_of_warp(); d < dim; d += 32)
    delta += real_at<bf16>(out.data, out.at(b, h, i) + d * out.stride[3]) *
             real_at<bf16>(d_out.data, d_out.at(b, h, i) + d * d_out.stride[3]);
#pragma unroll
  for (int by = 16; by; by /= 2) delta += __shfl_xor_sync(kFullWarp, delta, by);
  if (lane_of_warp() != 0) return;
  if (d_lse.data) delta -= d_lse.get(b, h, i);
  const float log = lse.get(b, h, i);
  sums[row] = {log == -INFINITY ? INFINITY : log * kLog2e, delta};
}

// Tiles that stay, a and b, and pairs of tiles that pass by.
template <int kPassing, int D>
struct Memory {
  using Still = Tile<kBlockRows, D>;
  using Passing = Tile<kPassing, D>;
  static constexpr size_t kBytes = shared_bytes<uint16_t[Still::kSize], 1024>(2) +
                                   shared_bytes<uint16_t[Passing::kSize], 1024>(2 * kStages) +
                                   shared_bytes<Barrier>(1 + 2 * kStages);
  uint16_t (*still)[Still::kSize];
  uint16_t (*a)[Passing::kSize], (*b)[Passing::kSize];  // by stages
  Barrier *still_full, *full, *empty;

  __device__ Memory() {
    Shared shared;
    still = shared.take<uint16_t[Still::kSize], 1024>(2);
    a = shared.take<uint16_t[Passing::kSize], 1024>(2 * kStages);
    b = a + kStages;
    still_full = shared.take<Barrier>(1 + 2 * kStages);
    full = still_full + 1;
    empty = full + kStages;
    if (threadIdx.x == 0) {
      still_full->init(1);
      for (int i = 0; i < kStages; ++i) {
        full[i].init(1);
        empty[i].init(kConsumerWarps);
      }
    }
    hopper::publish_barriers();
  }
  __device__ void copy_still(const TileMap& a_map, const TileMap& b_map, int64_t row, int64_t head,
                             int64_t batch) const {
    still_full->arrive_expecting(2 * Still::kBytes);
    Still::copy(still[0], a_map, still_full, row, head, batch);
    Still::copy(still[1], b_map, still_full, row, head, batch);
  }
  // The n-th pair.
  __device__ void copy_pair(int n, const TileMap& a_map, const TileMap& b_map, int64_t row,
                            int64_t head, int64_t batch) const {
    const Use use(n);
    empty[use.stage].wait(1 - use.parity);
    full[use.stage].arrive_expecting(2 * Passing::kBytes);
    Passing::copy(a[use.stage], a_map, &full[use.stage], row, head, batch);
    Passing::copy(b[use.stage], b_map, &full[use.stage], row, head, batch);
  }
  __device__ void release(int n) const {
    if (lane_of_warp() == 0) empty[Use(n).stage].arrive();
  }
};

// scores (64, kPassing) = rows of the consumer in `still` times rows of the tile that passes, begun.
template <bool bf16, int kPassing, int D>
__device__ void begin_scores(float (&scores)[kPassing / 2], const uint16_t* still,
                             const uint16_t* passing, const Place& place) {
  using M = Memory<kPassing, D>;
  hopper::hold(scores);
  hopper::begin();
#pragma unroll
  for (int d = 0; d < D; d += 16)
    hopper::product<bf16>(scores, M::Still::rows(still, d, place.warpgroup * kConsumerRows),
                          M::Passing::rows(passing, d), d > 0);
  hopper::commit();
}
// sums (64, D) += weights (64, kPassing) times the tile, begun.
template <bool bf16, int kPassing, int D>
__device__ void begin_sums(float (&sums)[D / 2], const uint32_t (&weights)[kPassing / 16][4],
                           const uint16_t* passing) {
  hopper::hold(sums);
  hopper::begin();
#pragma unroll
  for (int k = 0; k < kPassing / 16; ++k)
    hopper::product<bf16, true>(sums, weights[k],
                                Memory<kPassing, D>::Passing::columns(passing, k * 16));
  hopper::commit();
}

// q, d_out (B, Hq, Sq, D), k, v (B, Hk, Sk, D), sums (B, Hq, Sq) -> dk, dv (B, Hk, Sk, D).
// A block has 128 keys in place, and all queries of the group's heads pass by.
template <bool bf16, int D>
__global__ void __launch_bounds__(kLanes, 1)
    hopper_keys_kernel(const __grid_constant__ TileMap q_map, const __grid_constant__ TileMap k_map,
                       const __grid_constant__ TileMap v_map,
                       const __grid_constant__ TileMap d_out_map,
                       const __grid_constant__ Task task) {
  constexpr int kQueries = 64;  // of a tile
  const Memory<kQueries, D> memory;
  const int64_t k_first = blockIdx.x % task.tiles * kBlockRows;
  const int64_t kv_head = blockIdx.x / task.tiles % task.kv_heads;
  const int64_t batch = blockIdx.x / task.tiles / task.kv_heads;
  const Window& window = task.window;
  const int64_t k_last = min(k_first + kBlockRows, window.sk) - 1;
  const Tiles tiles(window.first_query(k_first), window.last_query(k_last), kQueries);
  const int count = tiles.count * static_cast<int>(task.group);

  if (threadIdx.x < 128) {
    hopper::fewer_registers<24>();
    if (threadIdx.x != 0 || count == 0) return;
    memory.copy_still(k_map, v_map, k_first, kv_head, batch);
    for (int n = 0; n < count; ++n)
      memory.copy_pair(n, q_map, d_out_map, (tiles.first + n % tiles.count) * kQueries,
                       kv_head * task.group + n / tiles.count, batch);
    return;
  }
  hopper::more_registers<240>();
  const Place place;
  float dk[D / 2] = {}, dv[D / 2] = {};
  if (count > 0) memory.still_full->wait(0);
  for (int n = 0; n < count; ++n) {
    const Use use(n);
    const int64_t q_first = (tiles.first + n % tiles.count) * kQueries;
    const int left = static_cast<int>(min(window.sq - q_first, int64_t{kQueries}));
    const Sums* sums = task.sums_of(batch, kv_head * task.group + n / tiles.count) + q_first;
    float p[kQueries / 2], ds[kQueries / 2];
    uint32_t weights[kQueries / 16][4], d_weights[kQueries / 16][4];
    memory.full[use.stage].wait(use.parity);
    begin_scores<bf16, kQueries, D>(p, memory.still[0], memory.a[use.stage], place);
    begin_scores<bf16, kQueries, D>(ds, memory.still[1], memory.b[use.stage], place);
    hopper::wait<1>();
    hopper::hold(p);
    if (q_first < window.first_query(k_first + kBlockRows - 1) ||
        q_first + kQueries - 1 > window.last_query(k_first))
      mask(p, place, [&](int row) { return window.queries_of(k_first + row, q_first); });
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) {
      const float lse = place.column(i) < left ? sums[place.column(i)].lse : INFINITY;
      p[i] = exp2f(p[i] * task.log2_scale - lse);
    }
    to_operand<bf16>(p, weights);
    begin_sums<bf16, kQueries, D>(dv, weights, memory.b[use.stage]);
    hopper::wait<1>();
    hopper::hold(ds);
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) {
      const float delta = place.column(i) < left ? sums[place.column(i)].delta : 0.0f;
      ds[i] = p[i] * (ds[i] - delta);
    }
    to_operand<bf16>(ds, d_weights);
    begin_sums<bf16, kQueries, D>(dk, d_weights, memory.a[use.stage]);
    hopper::wait<0>();
    hopper::hold(dk);
    hopper::hold(dv);
    memory.release(n);
  }
  const float scaled[2] = {task.scale, task.scale}, ones[2] = {1, 1};
  const auto rows_of = [&](void* data, const int64_t (&stride)[3]) {
    return static_cast<uint16_t*>(data) + batch * stride[0] + kv_head * stride[1];
  };
  store_rows<bf16, D>(dk, scaled, place, rows_of(task.first, task.first_stride), k_first, window.sk,
                      task.first_stride[2]);
  store_rows<bf16, D>(dv, ones, place, rows_of(task.second, task.second_stride), k_first, window.sk,
                      task.second_stride[2]);
}

// The same -> dq (B, Hq, Sq, D). A block has 128 queries in place, and their keys pass by: 128 at a time
// at D 64, 64 at D 128, as the registers allow.
template <bool bf16, int D>
__global__ void __launch_bounds__(kLanes, 1)
    hopper_queries_kernel(const __grid_constant__ TileMap q_map,
                          const __grid_constant__ TileMap k_map,
                          const __grid_constant__ TileMap v_map,
                          const __grid_constant__ TileMap d_out_map,
                          const __grid_constant__ Task task) {
  constexpr int kKeys = 8192 / D;  // of a tile
  const Memory<kKeys, D> memory;
  // The last queries first: where attention is causal they take longest.
  const int64_t q_first = (task.tiles - 1 - blockIdx.x % task.tiles) * kBlockRows;
  const int64_t head = blockIdx.x / task.tiles % task.heads;
  const int64_t batch = blockIdx.x / task.tiles / task.heads;
  const Window& window = task.window;
  const int64_t q_last = min(q_first + kBlockRows, window.sq) - 1;
  const Tiles tiles(window.first_key(q_first), window.last_key(q_last), kKeys);

  if (threadIdx.x < 128) {
    hopper::fewer_registers<24>();
    if (threadIdx.x != 0 || tiles.count == 0) return;
    memory.copy_still(q_map, d_out_map, q_first, head, batch);
    for (int n = 0; n < tiles.count; ++n)
      memory.copy_pair(n, k_map, v_map, (tiles.first + n) * kKeys, head / task.group, batch);
    return;
  }
  hopper::more_registers<240>();
  const Place place;
  float dq[D / 2] = {};
  Sums sums[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = q_first + place.row + half * 8;
    sums[half] = query < window.sq ? task.sums_of(batch, head)[query] : Sums{INFINITY, 0};
  }
  if (tiles.count > 0) memory.still_full->wait(0);
  for (int n = 0; n < tiles.count; ++n) {
    const Use use(n);
    const int64_t k_first = (tiles.first + n) * kKeys;
    float p[kKeys / 2], ds[kKeys / 2];
    uint32_t d_weights[kKeys / 16][4];
    memory.full[use.stage].wait(use.parity);
    begin_scores<bf16, kKeys, D>(p, memory.still[0], memory.a[use.stage], place);
    begin_scores<bf16, kKeys, D>(ds, memory.still[1], memory.b[use.stage], place);
    hopper::wait<1>();
    hopper::hold(p);
    if (k_first + kKeys - 1 > window.last_key(q_first) ||
        k_first < window.first_key(q_first + kBlockRows - 1))
      mask(p, place, [&](int row) { return window.keys_of(q_first + row, k_first); });
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) p[i] = exp2f(p[i] * task.log2_scale - sums[i / 2 % 2].lse);
    hopper::wait<0>();
    hopper::hold(ds);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) ds[i] = p[i] * (ds[i] - sums[i / 2 % 2].delta);
    to_operand<bf16>(ds, d_weights);
    begin_sums<bf16, kKeys, D>(dq, d_weights, memory.a[use.stage]);
    hopper::wait<0>();
    hopper::hold(dq);
    memory.release(n);
  }
  const float scaled[2] = {task.scale, task.scale};
  auto* to = static_cast<uint16_t*>(task.first) + batch * task.first_stride[0] +
             head * task.first_stride[1];
  store_rows<bf16, D>(dq, scaled, place, to, q_first, window.sq, task.first_stride[2]);
}

template <bool bf16, int D>
void launch_backward(const CudaStream& stream, const Problem& p, const Gradients& g, Task task,
                     Sums* sums) {
  const int64_t rows = p.batch * p.heads * p.max_q;
  launch(stream, "attention: sums", hopper_sums_kernel<bf16>,
         Grid{blocks_of(ceil_div(rows, int64_t{4})), 128}, Rows(g.out), Rows(g.d_out), Logs(g.lse),
         Logs(g.d_lse), rows, p.heads, p.max_q, D, sums);
  const Shape q(p.q, p.batch, p.heads, p.max_q, D), d_out(g.d_out, p.batch, p.heads, p.max_q, D);
  const Shape k(p.k, p.batch, p.kv_heads, p.max_k, D), v(p.v, p.batch, p.kv_heads, p.max_k, D);
  const auto results = [](const Operand& x, void*& data, int64_t (&stride)[3]) {
    data = x.data;
    for (int i = 0; i < 3; ++i) stride[i] = x.stride[i];
  };

  constexpr int kQueries = 64, kKeys = 8192 / D;
  task.tiles = ceil_div(p.max_k, int64_t{kBlockRows});
  results(g.dk, task.first, task.first_stride);
  results(g.dv, task.second, task.second_stride);
  launch(stream, "attention: gradients of keys", hopper_keys_kernel<bf16, D>,
         Grid{blocks_of(task.tiles * p.kv_heads * p.batch), kLanes, Memory<kQueries, D>::kBytes},
         tile_map(q, kQueries), tile_map(k, kBlockRows), tile_map(v, kBlockRows),
         tile_map(d_out, kQueries), task);
  task.tiles = ceil_div(p.max_q, int64_t{kBlockRows});
  results(g.dq, task.first, task.first_stride);
  launch(stream, "attention: gradients of queries", hopper_queries_kernel<bf16, D>,
         Grid{blocks_of(task.tiles * p.heads * p.batch), kLanes, Memory<kKeys, D>::kBytes},
         tile_map(q, kBlockRows), tile_map(k, kKeys), tile_map(v, kKeys),
         tile_map(d_out, kBlockRows), task);
}

}  // namespace

bool hopper_takes(const Problem& p, const Gradients& g) {
  Outputs forward;
  forward.out = g.dq;
  return hopper_takes(p, forward) && g.dq.data && g.dk.data && g.dv.data && can_store(g.dk) &&
         can_store(g.dv) && g.lse.data && is_logs(g.lse) && !g.d_key_mass &&
         (!g.d_lse.data || is_logs(g.d_lse)) &&
         can_tile(Shape(g.d_out, p.batch, p.heads, p.max_q, p.dim));
}

int64_t hopper_backward_scratch(const Problem& p) {
  return p.batch * p.heads * p.max_q * static_cast<int64_t>(sizeof(Sums));
}

void hopper_backward(const CudaStream& stream, const Problem& p, const Gradients& g,
                     void* scratch) {
  auto* sums = static_cast<Sums*>(scratch);
  const auto scale = static_cast<float>(p.scale);
  const Task task{Window(p),      0,    p.heads, p.kv_heads, p.group(), scale,
                  scale * kLog2e, sums, nullptr, nullptr,    {},        {}};
  with_types(
      p, [&](auto bf16, auto dim) { launch_backward<bf16(), dim()>(stream, p, g, task, sums); });
}

}  // namespace pentad::attention::cuda
