// SPDX-License-Identifier: Apache-2.0
// Gradients of max pooling: each weight of the vocabulary has one token or none, so that rows are
// gathered, and no product of matrices is formed. Those of sum pooling stand in splade_sum.cu.
#include "sparse/splade.cuh"
#include "sparse/splade_sum.cuh"

namespace pentad::sparse::cuda {
namespace {

constexpr int kWords = 8;         // of a block that makes rows of d_weight, one per warp
constexpr int kTokens = 16;       // of a block that makes rows of d_hidden, one per warp
constexpr int kRowNumbers = 256;  // eight for each lane
constexpr int kParts = 4;         // of a row, that a warp has at once
constexpr int64_t kSpan = kParts * kRowNumbers;

// Part of a row in a warp: lane has eight numbers of each 256.
struct RowSums {
  float sums[kParts][8] = {};

  template <class T>
  __device__ void add(const Operand<T>& rows, int64_t row, int64_t first, float factor) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = first + p * kRowNumbers + lane_of_warp() * 8;
      if (at >= rows.dim) continue;
      float x[8];
      rows.read_eight(row, at, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[p][i] += factor * x[i];
    }
  }
  template <class T>
  __device__ void write(T* row, int64_t first, int64_t dim) const {
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = first + p * kRowNumbers + lane_of_warp() * 8;
      alignas(16) T piece[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) piece[i] = narrowed<T>(sums[p][i]);
      if (aligned && at + 8 <= dim) {
#pragma unroll
        for (int i = 0; i < 8 / Operand<T>::kPiece; ++i)
          reinterpret_cast<uint4*>(row + at)[i] = reinterpret_cast<const uint4*>(piece)[i];
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (at + i < dim) row[at + i] = piece[i];
      }
    }
  }
};

template <class T>
struct Backward {
  HeadArrays<T> in;
  const T* d_out;
  int64_t d_out_strides[2];
  const float* top;
  const int32_t* place;
  T *d_hidden, *d_weight, *d_bias;

  // The token of a weight, or -1 where it gives no gradient, and its slope.
  __device__ int token_of(int64_t b, int64_t v) const {
    const int l = place[b * in.vocabulary + v];
    return l < in.length && given(b, v) != 0 ? l : -1;
  }
  __device__ float given(int64_t b, int64_t v) const {
    return widened(d_out[b * d_out_strides[0] + v * d_out_strides[1]]);
  }
  __device__ float slope(int64_t b, int64_t v) const {
    return given(b, v) * derivative(top[b * in.vocabulary + v], in.activation);
  }
};

// d_out, top, place (B, V), hidden (B, L, H) -> d_weight (V, H), d_bias (V): a warp for each word, the
// sequences in order. Limit: memory, the rows of hidden that are gathered (from the cache, as a rule)
// and d_weight.
template <class T>
__global__ void __launch_bounds__(kWords * 32) weight_rows(Backward<T> task) {
  const HeadArrays<T>& in = task.in;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = tid / 32;
  const int64_t first_word = int64_t{blockIdx.x} * kWords, v = first_word + warp;
  Shared shared;
  auto* tokens = shared.take<int[33]>(kWords);
  auto* slopes = shared.take<float[33]>(kWords);
  const int64_t dim = task.d_weight ? in.hidden.dim : 1;
  for (int64_t first = 0; first < dim; first += kSpan) {
    RowSums row;
    float bias = 0;
    for (int64_t b0 = 0; b0 < in.batch; b0 += 32) {
      const int64_t b = b0 + tid / kWords, word = first_word + tid % kWords;
      const int l = b < in.batch && word < in.vocabulary ? task.token_of(b, word) : -1;
      __syncthreads();
      tokens[tid % kWords][tid / kWords] = l;
      slopes[tid % kWords][tid / kWords] = l >= 0 ? task.slope(b, word) : 0.0f;
      __syncthreads();
      const int token = tokens[warp][lane];
      for (uint32_t left = __ballot_sync(kFullWarp, token >= 0); left; left &= left - 1) {
        const int at = __ffs(left) - 1;
        const float slope = slopes[warp][at];
        bias += slope;
        if (task.d_weight) row.add(in.hidden, in.token(b0 + at, tokens[warp][at]), first, slope);
      }
    }
    if (v >= in.vocabulary) continue;
    if (task.d_weight) row.write(task.d_weight + v * in.hidden.dim, first, in.hidden.dim);
    if (task.d_bias && first == 0 && lane == 0) task.d_bias[v] = narrowed<T>(bias);
  }
}

// d_out, top, place (B, V), weight (V, H) -> d_hidden (B, L, H): a warp for each token looks through
// the places of its sequence, 512 at a time for the 16 tokens of a block, and gathers in order.
// Limit: the places, B L V / 16 of 4 bytes from the cache, or the rows of weight.
template <class T>
__global__ void __launch_bounds__(kTokens * 32) token_rows(Backward<T> task, int64_t token_blocks) {
  constexpr int kLanes = kTokens * 32;
  const HeadArrays<T>& in = task.in;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  const int64_t b = blockIdx.x / token_blocks;
  const int64_t l = blockIdx.x % token_blocks * kTokens + tid / 32;
  Shared shared;
  int* places = shared.take<int>(kLanes);
  const int32_t* row_places = task.place + b * in.vocabulary;
  for (int64_t first = 0; first < in.weight.dim; first += kSpan) {
    RowSums row;
    for (int64_t v0 = 0; v0 < in.vocabulary; v0 += kLanes) {
      __syncthreads();
      places[tid] = v0 + tid < in.vocabulary ? row_places[v0 + tid] : -1;
      __syncthreads();
      for (int at = 0; at < kLanes; at += 32) {
        const bool mine = places[at + lane] == l;
        uint32_t left = __ballot_sync(kFullWarp, mine);
        if (!left) continue;
        float slope = 0;
        if (mine && task.given(b, v0 + at + lane) != 0) slope = task.slope(b, v0 + at + lane);
        for (; left; left &= left - 1) {
          const int from = __ffs(left) - 1;
          const float factor = __shfl_sync(kFullWarp, slope, from);
          if (factor != 0) row.add(in.weight, in.word(v0 + at + from), first, factor);
        }
      }
    }
    if (l < in.length)
      row.write(task.d_hidden + (b * in.length + l) * in.weight.dim, first, in.weight.dim);
  }
}

}  // namespace

int64_t splade_backward_scratch(const SpladeHead& head) {
  return head.pooling == SpladePooling::max ? 0 : splade_sum_scratch(head);
}

void splade_head_backward(const CudaStream& stream, const SpladeHead& head,
                          const SpladeGradients& gradients, void* scratch) {
  if (head.pooling == SpladePooling::sum)
    return splade_sum_backward(stream, head, gradients, scratch);
  with_type(head.hidden.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> task{HeadArrays<T>(head),
                           static_cast<const T*>(gradients.d_out.data),
                           {gradients.d_out.strides[0], gradients.d_out.strides[1]},
                           static_cast<const float*>(gradients.top),
                           gradients.place,
                           static_cast<T*>(gradients.d_hidden),
                           static_cast<T*>(gradients.d_weight),
                           static_cast<T*>(gradients.d_bias)};
    if ((task.d_weight || task.d_bias) && head.vocabulary() > 0)
      launch(stream, "sparse: weight_rows", weight_rows<T>,
             Grid{blocks_of(ceil_div(head.vocabulary(), kWords)), kWords * 32,
                  shared_bytes<int[33]>(kWords) + shared_bytes<float[33]>(kWords)},
             task);
    const int64_t token_blocks = ceil_div(head.length(), kTokens);
    if (task.d_hidden && head.batch() * token_blocks > 0)
      launch(stream, "sparse: token_rows", token_rows<T>,
             Grid{blocks_of(head.batch() * token_blocks), kTokens * 32,
                  shared_bytes<int>(kTokens * 32)},
             task, token_blocks);
  });
}

}  // namespace pentad::sparse::cuda
