// SPDX-License-Identifier: Apache-2.0
// Attention by tiles with a running softmax (Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1).
#include "attention/attention_hopper.h"
#include "attention/attention_sums.cuh"
#include "attention/attention_tile.cuh"

namespace pentad::attention::cuda {
namespace {

// How a block is cut, by dtype and head dimension. kM row tiles of a warp share the keys that it
// reads from shared memory; a block computes kValues dimensions of the output.
template <class T, int kDim>
struct Shape {
  static constexpr bool k16 = sizeof(T) == 2;
  static constexpr int kM = k16 && kDim <= 128 ? 2 : 1;
  static constexpr int kWarps = k16 || kDim <= 128 ? 4 : 2;
  static constexpr int kKeys = k16 ? (kDim == 64 || kDim == 256 ? 64 : 32) : kDim <= 128 ? 32 : 16;
  static constexpr int kValues = kDim < 256 ? kDim : 256;
  static constexpr int kRows = kWarps * kM * 16, kLanes = kWarps * 32;
  static constexpr int kPitch = pitch_of<T>(kDim), kValuePitch = pitch_of<T>(kValues);
  static constexpr int kSpare = kLanes * kM * kKeys / 2;
  static constexpr size_t kShared = shared_bytes<T>(kRows * kPitch) +
                                    shared_bytes<T>(kKeys * kPitch) +
                                    shared_bytes<T>(kKeys * kValuePitch);
};

struct Forward {
  Rules rules;
  Sequences sequences;
  Array q, k, v, out;
  Operand lse;
  int dim, value_dim;
  int tiles, chunks;  // of queries, and of the output's dimensions
  bool dropout;
};

// ln of a row's denominator z 2^most.
__device__ double lse_of(float most, float z) {
  if (most == infinity()) return most;
  return z == 0.0f ? -infinity() : most * kLn2 + log(static_cast<double>(z));
}

// q (b, h, i, dim), k (b, h / group, j, dim), v (.., value_dim) -> out (b, h, i, value_dim), lse.
// Limit: tensor cores, 4 Sq Sk dim operations per head, and one exp2 per score.
template <class T, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kLanes) forward_kernel(Forward task) {
  using S = Shape<T, kDim>;
  constexpr int kM = S::kM, kN = S::kKeys / 8, kOut = S::kValues / 8;
  // The longest rows of a causal mask come first.
  const int number = task.tiles - 1 - static_cast<int>(blockIdx.x % task.tiles);
  const int chunk = static_cast<int>(blockIdx.x / task.tiles % task.chunks);
  const int h = static_cast<int>(blockIdx.x / task.tiles / task.chunks);
  const TilePlace place = task.sequences.tile(false, S::kRows, number);
  const Sequence sequence = task.sequences[place.b];
  if (place.first >= sequence.q_len) return;
  const HeadRules head(task.rules, place.b, h, sequence.q_len, sequence.k_len, sequence.k_begin);
  const int kv_head = h / task.rules.group, column = chunk * S::kValues;
  const auto q = task.q.rows<T>(place.b, h, sequence.q_begin);
  const auto k = task.k.rows<T>(place.b, kv_head, sequence.k_begin);
  const auto v = task.v.rows<T>(place.b, kv_head, sequence.k_begin);

  Shared shared;
  T* q_tile = shared.take<T>(S::kRows * S::kPitch);
  T* k_tile = shared.take<T>(S::kKeys * S::kPitch);
  T* v_tile = shared.take<T>(S::kKeys * S::kValuePitch);
  float* spare = task.rules.modify() ? shared.take<float>(S::kSpare) : nullptr;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = lane_of_warp();
  const int own = place.first + warp * kM * 16;  // the warp's first query
  T* own_tile = q_tile + warp * kM * 16 * S::kPitch;

  float o[kM][kOut][4], most[2 * kM], sum[2 * kM];
  clear(o);
  const float sink = task.rules.sink ? task.rules.sink[h] * kLog2e : -infinity();
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    most[i] = sink;
    sum[i] = lane % 4 == 0 && sink != -infinity() ? 1.0f : 0.0f;
  }

  Walk<false, S::kRows, S::kKeys> walk(head, place.first);
  bool more = walk.next();
  load_tile<S::kRows, kDim, S::kLanes>(q_tile, q, place.first, head.q_len, 0, task.dim);
  if (more) load_tile<S::kKeys, kDim, S::kLanes>(k_tile, k, walk.first, head.k_len, 0, task.dim);
  while (more) {
    const int key = walk.first;
    const bool whole = walk.whole;
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the last values any more
    load_tile<S::kKeys, S::kValues, S::kLanes>(v_tile, v, key, head.k_len, column, task.value_dim);

    float c[kM][kN][4];
    clear(c);
    multiply_rows<kDim>(c, own_tile, k_tile, task.dim);
    const uint64_t seen = whole ? ~uint64_t{0} : seen_bits<false, kM, kN>(head, own, key);
    to_scores<false>(head, seen, own, key, c, spare);

    // The running maximum and sum of a row lie in its four lanes.
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      const int m = i / 2, half = i % 2 * 2;
      float top = most[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(c[m][n][half], c[m][n][half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      const float shrink = top == most[i] ? 1.0f : exp2_of<T>(most[i] - top);
      const float base = top == -infinity() ? 0.0f : top;
      float added = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int r = half; r < half + 2; ++r) {
          c[m][n][r] = exp2_of<T>(c[m][n][r] - base);
          added += c[m][n][r];
        }
      most[i] = top;
      sum[i] = sum[i] * shrink + added;  // of this lane's columns
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        o[m][n][half] *= shrink;
        o[m][n][half + 1] *= shrink;
      }
    }
    if (task.dropout) drop<false>(head, own, key, c);

    cp_async_wait<0>();
    __syncthreads();  // the values are there, and nobody reads the keys any more
    const bool careful = !whole && not_finite<S::kKeys, S::kValues, S::kLanes>(v_tile);
    more = walk.next();
    if (more) load_tile<S::kKeys, kDim, S::kLanes>(k_tile, k, walk.first, head.k_len, 0, task.dim);
    if (careful) multiply_seen(o, c, seen, v_tile, S::kValuePitch);
    else multiply_weights(o, c, v_tile, S::kValuePitch);
  }
  cp_async_wait<0>();
  __syncthreads();

  // Out through the warp's own rows of the queries' tile.
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int m = i / 2, half = i % 2 * 2, row = i * 8 + lane / 4;
    float z = sum[i];
    z += __shfl_xor_sync(kFullWarp, z, 1);
    z += __shfl_xor_sync(kFullWarp, z, 2);
    const float factor = z == 0.0f ? 0.0f : task.rules.keep_scale / z;
#pragma unroll
    for (int n = 0; n < kOut; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        own_tile[row * S::kPitch + n * 8 + lane % 4 * 2 + r] =
            from_float<T>(z == 0.0f ? 0.0f : o[m][n][half + r] * factor);
    if (lane % 4 == 0 && chunk == 0 && task.lse.data && own + row < head.q_len)
      write_real_at(task.lse, place.b, h, sequence.q_begin + own + row, lse_of(most[i], z));
  }
  __syncwarp();
  store_rows<kM * 16, S::kValues>(own_tile, S::kPitch,
                                  task.out.rows<T>(place.b, h, sequence.q_begin), own, head.q_len,
                                  column, task.value_dim);
}

template <class T, int kDim>
void run(const CudaStream& stream, Forward task, const Problem& p) {
  using S = Shape<T, kDim>;
  const int64_t tiles = task.sequences.tiles(false, S::kRows);
  task.chunks = static_cast<int>(ceil_div(p.value_dim, S::kValues));
  task.tiles = static_cast<int>(tiles);
  const Grid grid{blocks_of(tiles * task.chunks * p.heads), S::kLanes,
                  S::kShared + (task.rules.modify() ? shared_bytes<float>(S::kSpare) : 0)};
  launch(stream, "attention: forward", forward_kernel<T, kDim>, grid, task);
}

template <class T>
void run(const CudaStream& stream, const Forward& task, const Problem& p) {
  const int64_t dim = max(p.dim, p.value_dim);
  if (dim <= 64) run<T, 64>(stream, task, p);
  else if (dim <= 128) run<T, 128>(stream, task, p);
  else if (dim <= 256) run<T, 256>(stream, task, p);
  else run<T, 512>(stream, task, p);
}

}  // namespace

void forward(const CudaStream& stream, const Problem& p, const Packed& packed,
             const Outputs& outputs, void* scratch) {
  if (!packed.given() && hopper_wanted(stream.device) && hopper_takes(p, outputs))
    return hopper_forward(stream, p, outputs);
  const Sequences sequences(p, packed);
  const Forward task{Rules(p, packed.given()),
                     sequences,
                     Array(p.q, packed),
                     Array(p.k, packed),
                     Array(p.v, packed),
                     Array(outputs.out, packed),
                     sequences.rows_of(outputs.lse),
                     static_cast<int>(p.dim),
                     static_cast<int>(p.value_dim),
                     0,
                     0,
                     p.dropout > 0};
  if (p.batch && p.max_q) {
    if (p.q.dtype == DType::f32) run<float>(stream, task, p);
    else if (p.q.dtype == DType::bf16) run<__nv_bfloat16>(stream, task, p);
    else run<__half>(stream, task, p);
  }
  if (outputs.key_mass)
    key_mass(stream, p, packed, outputs.lse, static_cast<float*>(outputs.key_mass), scratch);
}

}  // namespace pentad::attention::cuda
