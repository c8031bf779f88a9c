// SPDX-License-Identifier: Apache-2.0
// Gradients of sum pooling: the logits are formed anew for a chunk of the vocabulary and all tokens,
// become slopes at once, and two more products give d_hidden, added up over the chunks, and d_weight.
// The tile program wants both operands along the inner dimension, so that slopes are written both
// ways, and hidden and weight transposed.
#include "sparse/splade_sum.cuh"

#include "sparse/splade.cuh"

namespace pentad::sparse::cuda {
namespace {

constexpr int64_t kSlopeBytes = int64_t{64} << 20;  // of one of the two forms of a chunk's slopes
constexpr int64_t kMostWords = 8192;
constexpr int kTurn = 32, kTurnLanes = 256;
constexpr int kBiasLanes = 256;
constexpr int64_t kAlign = 256;

// Tokens are counted through all sequences; rows are padded to multiples of 16 bytes.
struct Plan {
  int64_t tokens, padded, dim, size, words;

  explicit Plan(const SpladeHead& head)
      : tokens(head.batch() * head.length()),
        padded(ceil_div(tokens, 8) * 8),
        dim(head.dim()),
        size(size_of(head.hidden.dtype)),
        words(ceil_div(head.vocabulary(), kTile) * kTile) {
    const int64_t fit = kSlopeBytes / max(int64_t{1}, padded * size) / kTile * kTile;
    words = min(words, min(kMostWords, max(int64_t{kTile}, fit)));
  }
  static int64_t room(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }
  int64_t slopes() const { return room(tokens * words * size); }         // (tokens, words)
  int64_t turned_slopes() const { return room(words * padded * size); }  // (words, tokens)
  int64_t turned_hidden() const { return room(dim * padded * size); }    // (H, tokens)
  int64_t turned_weight() const { return room(dim * words * size); }     // (H, words)
  int64_t sums() const { return room(tokens * dim * 4); }                // (tokens, H) float32
};

template <class T>
struct SumTask {
  HeadArrays<T> in;
  TokenMask mask;
  const T* d_out;
  int64_t d_out_strides[2];
  int64_t tokens, padded, words;
  T *slopes, *turned_slopes;

  __device__ int64_t row(int64_t n) const {
    return n < tokens ? in.token(n / in.length, n % in.length) : kNowhere;
  }
  __device__ bool counts(int64_t n) const { return mask.at(n / in.length, n % in.length) == 1; }
};

// Rows [0, rows) of dim numbers -> their columns, (dim, pitch), 0 up to `pitch`.
// Limit: memory; a tile of 32 by 32 numbers passes through shared memory.
template <class T>
__global__ void __launch_bounds__(kTurnLanes) turn_tokens(SumTask<T> task, T* out) {
  Shared shared;
  auto* tile = shared.take<T[kTurn + 1]>(kTurn);
  const int x = static_cast<int>(threadIdx.x) % kTurn, y = static_cast<int>(threadIdx.x) / kTurn;
  const Operand<T>& from = task.in.hidden;
  const int64_t tiles = (from.dim + kTurn - 1) / kTurn;
  const int64_t column = blockIdx.x % tiles * kTurn, row = blockIdx.x / tiles * kTurn;
  for (int i = y; i < kTurn; i += kTurnLanes / kTurn) {
    const int64_t n = row + i;
    const bool there = n < task.tokens && column + x < from.dim && task.counts(n);
    tile[i][x] =
        there ? from.data[task.row(n) + (column + x) * from.col_stride] : narrowed<T>(0.0f);
  }
  __syncthreads();
  for (int i = y; i < kTurn; i += kTurnLanes / kTurn)
    if (column + i < from.dim && row + x < task.padded)
      out[(column + i) * task.padded + row + x] = tile[x][i];
}

// The same of the words [first, first + count) of weight, with `words` numbers to a row.
template <class T>
__global__ void __launch_bounds__(kTurnLanes)
    turn_words(SumTask<T> task, int64_t first, int64_t count, T* out) {
  Shared shared;
  auto* tile = shared.take<T[kTurn + 1]>(kTurn);
  const int x = static_cast<int>(threadIdx.x) % kTurn, y = static_cast<int>(threadIdx.x) / kTurn;
  const Operand<T>& from = task.in.weight;
  const int64_t tiles = (from.dim + kTurn - 1) / kTurn;
  const int64_t column = blockIdx.x % tiles * kTurn, row = blockIdx.x / tiles * kTurn;
  for (int i = y; i < kTurn; i += kTurnLanes / kTurn)
    tile[i][x] = row + i < count && column + x < from.dim
                     ? from.data[task.in.word(first + row + i) + (column + x) * from.col_stride]
                     : narrowed<T>(0.0f);
  __syncthreads();
  for (int i = y; i < kTurn; i += kTurnLanes / kTurn)
    if (column + i < from.dim && row + x < task.words)
      out[(column + i) * task.words + row + x] = tile[x][i];
}

// hidden, weight, bias, d_out -> the slopes of the words [first, first + count), (tokens, words) and
// (words, padded). Limit: products, 2 tokens words H.
template <class T>
__global__ void __launch_bounds__(kTileLanes, kTileBlocks<T>)
    splade_slopes(SumTask<T> task, int64_t first, int64_t count, int64_t token_tiles) {
  using Sums = TileSums<T>;
  const HeadArrays<T>& in = task.in;
  const int64_t n0 = blockIdx.x % token_tiles * kTile, w0 = blockIdx.x / token_tiles * kTile;
  Shared shared;
  TileRow* buffers = shared.take<TileRow>(kStages * kBufferRows);
  tile_products(
      1, in.hidden, [&](int64_t, int row) { return task.row(n0 + row); }, in.weight,
      [&](int row) { return in.word(first + w0 + row); }, buffers,
      [&](int64_t, const Sums& sums) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int64_t w = w0 + Sums::col(j), v = first + w;
          if (w >= count) continue;
          const float bias = in.bias_of(v);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int64_t n = n0 + Sums::row(i);
            if (n >= task.tokens) continue;
            const float x = sums.at(i, j) + bias;
            float slope = 0;
            if (!(x <= 0) && task.counts(n)) {
              const int64_t b = n / in.length;
              const float given =
                  widened(task.d_out[b * task.d_out_strides[0] + v * task.d_out_strides[1]]);
              if (given != 0) slope = given * derivative(x, in.activation);
            }
            task.slopes[n * task.words + w] = narrowed<T>(slope);
            task.turned_slopes[w * task.padded + n] = narrowed<T>(slope);
          }
        }
      });
}

// Slopes (words, tokens) -> d_bias (words), a warp for each. Limit: memory.
template <class T>
__global__ void __launch_bounds__(kBiasLanes) bias_sums(SumTask<T> task, int64_t count, T* d_bias) {
  const int64_t w = (int64_t{blockIdx.x} * kBiasLanes + threadIdx.x) / 32;
  if (w >= count) return;
  float sum = 0;
  for (int64_t n = lane_of_warp(); n < task.tokens; n += 32)
    sum += widened(task.turned_slopes[w * task.padded + n]);
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(kFullWarp, sum, by);
  if (lane_of_warp() == 0) d_bias[w] = narrowed<T>(sum);
}

// a (rows, K), b (columns, K) -> out (rows, columns), float32 added to what is there or not, or T.
// Limit: products, 2 rows columns K.
enum class Into { store, add };
template <class T, class To>
__global__ void __launch_bounds__(kTileLanes, kTileBlocks<T>)
    product(Operand<T> a, int64_t rows, int64_t a_pitch, Operand<T> b, int64_t columns,
            int64_t b_pitch, int64_t row_tiles, Into into, To* out) {
  using Sums = TileSums<T>;
  const int64_t r0 = blockIdx.x % row_tiles * kTile, c0 = blockIdx.x / row_tiles * kTile;
  Shared shared;
  TileRow* buffers = shared.take<TileRow>(kStages * kBufferRows);
  tile_products(
      1, a, [&](int64_t, int row) { return r0 + row < rows ? (r0 + row) * a_pitch : kNowhere; }, b,
      [&](int row) { return c0 + row < columns ? (c0 + row) * b_pitch : kNowhere; }, buffers,
      [&](int64_t, const Sums& sums) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int64_t r = r0 + Sums::row(i);
          if (r >= rows) continue;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int64_t c = c0 + Sums::col(j);
            if (c >= columns) continue;
            To* to = out + r * columns + c;
            if constexpr (std::is_same_v<To, float>)
              *to = into == Into::add ? *to + sums.at(i, j) : sums.at(i, j);
            else *to = narrowed<To>(sums.at(i, j));
          }
        }
      });
}

// Limit: memory.
template <class T>
__global__ void __launch_bounds__(kBiasLanes) narrow_all(const float* from, int64_t count, T* to) {
  const int64_t i = int64_t{blockIdx.x} * kBiasLanes + threadIdx.x;
  if (i < count) to[i] = narrowed<T>(from[i]);
}
template <class T>
__global__ void __launch_bounds__(kBiasLanes) fill_zero(int64_t count, T* to) {
  const int64_t i = int64_t{blockIdx.x} * kBiasLanes + threadIdx.x;
  if (i < count) to[i] = narrowed<T>(0.0f);
}

template <class T>
void zeros(const CudaStream& stream, int64_t count, T* to) {
  if (count && to)
    launch(stream, "sparse: fill_zero", fill_zero<T>,
           Grid{blocks_of(ceil_div(count, kBiasLanes)), kBiasLanes}, count, to);
}

template <class T>
void sum_backward(const CudaStream& stream, const SpladeHead& head,
                  const SpladeGradients& gradients, char* scratch) {
  const Plan plan(head);
  const int64_t dim = plan.dim, vocabulary = head.vocabulary();
  T* d_hidden = static_cast<T*>(gradients.d_hidden);
  T* d_weight = static_cast<T*>(gradients.d_weight);
  T* d_bias = static_cast<T*>(gradients.d_bias);
  if (plan.tokens == 0 || vocabulary == 0) {
    zeros(stream, plan.tokens * dim, d_hidden);
    zeros(stream, vocabulary * dim, d_weight);
    zeros(stream, vocabulary, d_bias);
    return;
  }
  const auto take = [&](int64_t bytes) {
    char* memory = scratch;
    scratch += bytes;
    return memory;
  };
  SumTask<T> task{HeadArrays<T>(head),
                  TokenMask::of(head),
                  static_cast<const T*>(gradients.d_out.data),
                  {gradients.d_out.strides[0], gradients.d_out.strides[1]},
                  plan.tokens,
                  plan.padded,
                  plan.words,
                  nullptr,
                  nullptr};
  task.slopes = reinterpret_cast<T*>(take(plan.slopes()));
  task.turned_slopes = reinterpret_cast<T*>(take(plan.turned_slopes()));
  T* hidden = reinterpret_cast<T*>(take(plan.turned_hidden()));
  T* weight = reinterpret_cast<T*>(take(plan.turned_weight()));
  float* sums = std::is_same_v<T, float> ? reinterpret_cast<float*>(d_hidden)
                                         : reinterpret_cast<float*>(take(plan.sums()));
  const int64_t turns = ceil_div(dim, kTurn), token_tiles = ceil_div(plan.tokens, kTile);
  const int64_t dim_tiles = ceil_div(dim, kTile);
  const size_t turn_shared = shared_bytes<T[kTurn + 1]>(kTurn);
  if (d_weight && dim)
    launch(stream, "sparse: turn_tokens", turn_tokens<T>,
           Grid{blocks_of(turns * ceil_div(plan.padded, kTurn)), kTurnLanes, turn_shared}, task,
           hidden);
  for (int64_t first = 0; first < vocabulary; first += plan.words) {
    const int64_t count = min(plan.words, vocabulary - first), tiles = ceil_div(count, kTile);
    launch(stream, "sparse: splade_slopes", splade_slopes<T>,
           Grid{blocks_of(token_tiles * tiles), kTileLanes, kTileShared}, task, first, count,
           token_tiles);
    if (d_bias)
      launch(stream, "sparse: bias_sums", bias_sums<T>,
             Grid{blocks_of(ceil_div(count * 32, kBiasLanes)), kBiasLanes}, task, count,
             d_bias + first);
    if (d_weight && dim)
      launch(stream, "sparse: d_weight", product<T, T>,
             Grid{blocks_of(tiles * dim_tiles), kTileLanes, kTileShared},
             Operand<T>{task.turned_slopes, 1, plan.tokens, true}, count, plan.padded,
             Operand<T>{hidden, 1, plan.tokens, true}, dim, plan.padded, tiles, Into::store,
             d_weight + first * dim);
    if (d_hidden && dim) {
      launch(stream, "sparse: turn_words", turn_words<T>,
             Grid{blocks_of(turns * ceil_div(count, kTurn)), kTurnLanes, turn_shared}, task, first,
             count, weight);
      launch(stream, "sparse: d_hidden", product<T, float>,
             Grid{blocks_of(token_tiles * dim_tiles), kTileLanes, kTileShared},
             Operand<T>{task.slopes, 1, count, true}, plan.tokens, plan.words,
             Operand<T>{weight, 1, count, true}, dim, plan.words, token_tiles,
             first == 0 ? Into::store : Into::add, sums);
    }
  }
  if constexpr (!std::is_same_v<T, float>)
    if (d_hidden && dim)
      launch(stream, "sparse: narrow_all", narrow_all<T>,
             Grid{blocks_of(ceil_div(plan.tokens * dim, kBiasLanes)), kBiasLanes}, sums,
             plan.tokens * dim, d_hidden);
}

}  // namespace

int64_t splade_sum_scratch(const SpladeHead& head) {
  const Plan plan(head);
  return plan.slopes() + plan.turned_slopes() + plan.turned_hidden() + plan.turned_weight() +
         plan.sums();
}

void splade_sum_backward(const CudaStream& stream, const SpladeHead& head,
                         const SpladeGradients& gradients, void* scratch) {
  with_type(head.hidden.dtype, [&](auto zero) {
    sum_backward<decltype(zero)>(stream, head, gradients, static_cast<char*>(scratch));
  });
}

}  // namespace pentad::sparse::cuda
