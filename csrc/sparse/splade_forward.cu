// SPDX-License-Identifier: Apache-2.0
// The SPLADE head: a block takes 128 words of the vocabulary and walks through the tokens of one
// sequence, 128 at a time; logits stay in registers, where they are pooled.
#include "sparse/splade.cuh"

namespace pentad::sparse::cuda {
namespace {

constexpr int kListLanes = 256;

// mask (B, L) -> tokens (B, L), the l with mask 1 in order, and how many, or -1 for another number.
// Limit: latency; a block for each sequence.
__global__ void __launch_bounds__(kListLanes)
    list_tokens(TokenMask mask, int64_t length, int32_t* tokens, int32_t* counts) {
  const int tid = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = tid / 32;
  const int64_t b = blockIdx.x;
  Shared shared;
  int* in_warp = shared.take<int>(kListLanes / 32);
  int count = 0;
  bool odd = false;
  for (int64_t first = 0; first < length; first += kListLanes) {
    const int value = first + tid < length ? mask.at(b, first + tid) : 0;
    odd |= value < 0;
    const uint32_t live = __ballot_sync(kFullWarp, value == 1);
    if (lane == 0) in_warp[warp] = __popc(live);
    __syncthreads();
    int before = count;
    for (int w = 0; w < kListLanes / 32; ++w) {
      if (w < warp) before += in_warp[w];
      count += in_warp[w];
    }
    if (value == 1)
      tokens[b * length + before + __popc(live & ((1u << lane) - 1))] =
          static_cast<int32_t>(first + tid);
    __syncthreads();
  }
  if (__syncthreads_or(odd)) count = -1;
  if (tid == 0) counts[b] = count;
}

template <class T>
struct Forward {
  HeadArrays<T> in;
  const int32_t *tokens, *counts;
  T* out;
  float* top;
  int32_t* place;
};

constexpr int kGroupPitch = kTile + 4;

// hidden (B, L, H), weight (V, H), bias (V) -> out (B, V); top, place (B, V) where wanted.
// Limit: products, 2 B L V H floating-point operations. Blocks of one tile of words follow each other,
// so that weight is read once from memory and hidden comes from the cache.
template <class T, SpladePooling kPooling>
__global__ void __launch_bounds__(kTileLanes, kTileBlocks<T>) splade_forward(Forward<T> task) {
  using Sums = TileSums<T>;
  const HeadArrays<T>& in = task.in;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x % in.batch, first_word = blockIdx.x / in.batch * kTile;
  const int32_t* tokens = task.tokens + b * in.length;
  const int count = task.counts[b];
  Shared shared;
  TileRow* buffers = shared.take<TileRow>(kStages * kBufferRows);
  float* bias = shared.take<float>(kTile);
  auto* values = shared.take<float[kGroupPitch]>(kGroups);
  auto* places = shared.take<int[kGroupPitch]>(kGroups);
  if (tid < kTile) bias[tid] = in.bias_of(first_word + tid);
  __syncthreads();

  float value[8] = {};  // the maximum, or the sum
  int place[8];
  uint32_t nan = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) place[j] = -1;
  tile_products((max(count, 0) + kTile - 1) / kTile, in.hidden,
                [&](int64_t tile, int row) {
                  const int64_t n = tile * kTile + row;
                  return n < count ? in.token(b, tokens[n]) : kNowhere;
                },
                in.weight, [&](int row) { return in.word(first_word + row); }, buffers,
                [&](int64_t tile, const Sums& sums) {
#pragma unroll
                  for (int j = 0; j < 8; ++j) {
                    const float of_word = bias[Sums::col(j)];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                      const int n = static_cast<int>(tile) * kTile + Sums::row(i);
                      if (n >= count) continue;
                      const float x = sums.at(i, j) + of_word;
                      if constexpr (kPooling == SpladePooling::sum) {
                        value[j] += act(x, in.activation);
                      } else {
                        if (x != x) nan |= 1u << j;
                        if (x > value[j]) value[j] = x, place[j] = n;
                      }
                    }
                  }
                });

#pragma unroll
  for (int j = 0; j < 8; ++j) {
    values[Sums::group()][Sums::col(j)] = nan >> j & 1 ? __uint_as_float(0x7fc00000) : value[j];
    places[Sums::group()][Sums::col(j)] = place[j];
  }
  __syncthreads();
  const int64_t v = first_word + tid, i = b * in.vocabulary + v;
  if (tid >= kTile || v >= in.vocabulary) return;
  float best = 0;
  int at = -1;
  for (int g = 0; g < kGroups; ++g) {
    const float x = values[g][tid];
    const int n = places[g][tid];
    if constexpr (kPooling == SpladePooling::sum) best += x;
    else if (x != x) best = x;
    else if (x > best || (x == best && n >= 0 && n < at)) best = x, at = n;
  }
  if (count < 0) best = __uint_as_float(0x7fc00000);
  if constexpr (kPooling == SpladePooling::sum) {
    task.out[i] = narrowed<T>(best);
  } else {
    if (best != best) at = 0;
    task.out[i] = narrowed<T>(act(best, in.activation));
    if (task.top) task.top[i] = best;
    if (task.place) task.place[i] = at < 0 || count <= 0 ? -1 : tokens[at];
  }
}

}  // namespace

int64_t splade_scratch(int64_t batch, int64_t length) {
  return (batch * length + batch) * static_cast<int64_t>(sizeof(int32_t));
}

void splade_head(const CudaStream& stream, const SpladeHead& head, const SpladeOutputs& outputs,
                 void* scratch) {
  if (head.batch() == 0 || head.vocabulary() == 0) return;
  int32_t* counts = static_cast<int32_t*>(scratch);
  int32_t* tokens = counts + head.batch();
  launch(stream, "sparse: list_tokens", list_tokens,
         Grid{blocks_of(head.batch()), kListLanes, shared_bytes<int>(kListLanes / 32)},
         TokenMask::of(head), head.length(), tokens, counts);
  with_type(head.hidden.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> task{HeadArrays<T>(head),
                          tokens,
                          counts,
                          static_cast<T*>(outputs.out),
                          static_cast<float*>(outputs.top),
                          outputs.place};
    const Grid grid{blocks_of(head.batch() * ceil_div(head.vocabulary(), kTile)), kTileLanes,
                    kTileShared + shared_bytes<float>(kTile) +
                        shared_bytes<float[kGroupPitch]>(kGroups) +
                        shared_bytes<int[kGroupPitch]>(kGroups)};
    launch(stream, "sparse: splade_forward",
           head.pooling == SpladePooling::max ? splade_forward<T, SpladePooling::max>
                                              : splade_forward<T, SpladePooling::sum>,
           grid, task);
  });
}

}  // namespace pentad::sparse::cuda
