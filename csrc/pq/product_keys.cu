// SPDX-License-Identifier: Apache-2.0
// Product-key memory: half scores, the best keys of each half, the best pairs of those, and the sum
// of their values. Rows pass in groups, so that half scores take some 64 MB.
#include "common/topk.cuh"
#include "pq/pq_device.cuh"
#include "pq/product_keys_cuda.h"

namespace pentad::pq::cuda {
namespace {

constexpr int kTile = 64;   // queries, and keys, of a block
constexpr int kDepth = 16;  // columns in shared memory at a time
constexpr int kPitch = kTile + 4;
constexpr int64_t kScores = 1 << 24;       // of a group of rows
constexpr int64_t kSharedPairs = 1 << 10;  // more are sorted in scratch memory
constexpr int64_t kPairBlocks = 512;       // that do this at once

struct KeysTask {
  ProductKeys in;
  ProductKeysOut out;
  int64_t first, rows;  // of this group
  int best;             // keys of each half: min(k, n)
  float* scores;        // (heads, 2, rows, n)
  uint64_t* hits;       // (heads, 2, rows, best)

  __device__ float query(int64_t row, int64_t head, int64_t j) const {
    const TensorView& q = in.q;
    return float_at(q.data, q.dtype,
                    (first + row) * q.strides[0] + head * q.strides[1] + j * q.strides[2]);
  }
  __device__ float subkey(int64_t head, int64_t half, int64_t i, int64_t j) const {
    const TensorView& s = in.subkeys;
    return float_at(
        s.data, s.dtype,
        head * s.strides[0] + half * s.strides[1] + i * s.strides[2] + j * s.strides[3]);
  }
};

// q (rows, heads, 2 half), subkeys (heads, 2, n, half) -> scores (heads, 2, rows, n), chains of
// products and sums that are rounded apart, as the definition has them.
// Limit: multiplications and additions.
__global__ void __launch_bounds__(kLanes)
    score_keys(KeysTask task, int64_t row_tiles, int64_t key_tiles) {
  const int tid = static_cast<int>(threadIdx.x), tx = tid % 16, ty = tid / 16;
  const int64_t side = quotient(blockIdx.x, row_tiles * key_tiles);  // head * 2 + half
  const int64_t tile = blockIdx.x - side * row_tiles * key_tiles;
  const int64_t first_row = quotient(tile, key_tiles) * kTile;
  const int64_t first_key = (tile - quotient(tile, key_tiles) * key_tiles) * kTile;
  const int64_t head = side / 2, width = task.in.half(), n = task.in.keys();
  Shared shared;
  auto* rows = shared.take<float[kPitch]>(kDepth);
  auto* keys = shared.take<float[kPitch]>(kDepth);
  float sums[4][4] = {};
  for (int64_t j_first = 0; j_first < width; j_first += kDepth) {
    __syncthreads();
#pragma unroll 1
    for (int s = 0; s < kTile * kDepth / kLanes; ++s) {
      const int j = tid % kDepth, r = tid / kDepth + s * (kLanes / kDepth);
      const bool inside = j_first + j < width;
      rows[j][r] = inside && first_row + r < task.rows
                       ? task.query(first_row + r, head, side % 2 * width + j_first + j)
                       : 0.0f;
      keys[j][r] = inside && first_key + r < n
                       ? task.subkey(head, side % 2, first_key + r, j_first + j)
                       : 0.0f;
    }
    __syncthreads();
    const int depth = static_cast<int>(min(int64_t{kDepth}, width - j_first));
    for (int j = 0; j < depth; ++j) {
      const float4 a4 = *reinterpret_cast<const float4*>(&rows[j][ty * 4]);
      const float4 b4 = *reinterpret_cast<const float4*>(&keys[j][tx * 4]);
      const float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] = __fadd_rn(sums[r][c], __fmul_rn(a[r], b[c]));
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t row = first_row + ty * 4 + r, key = first_key + tx * 4 + c;
      if (row < task.rows && key < n) task.scores[(side * task.rows + row) * n + key] = sums[r][c];
    }
}

// Larger scores come first, NaN before all; 0 and -0 are equal.
__device__ inline uint32_t score_key(float score) {
  return score == score ? ~device_key_from_float(score + 0.0f) : 0;
}

// scores (heads, 2, rows, n) -> hits (heads, 2, rows, best), a block for each row.
// Limit: memory, then the barriers of a sort.
__global__ void __launch_bounds__(kLanes) best_keys(KeysTask task, int capacity) {
  Shared shared;
  uint64_t* hits = shared.take<uint64_t>(capacity);
  uint64_t* limit = shared.take<uint64_t>(1);
  int* count = shared.take<int>(1);
  const HitList list{hits, count, limit, capacity, task.best};
  const int64_t n = task.in.keys();
  const float* scores = task.scores + blockIdx.x * n;
  if (threadIdx.x == 0) list.clear();
  __syncthreads();
  for (int64_t first = 0; first < n; first += kLanes) {
    const int64_t i = first + static_cast<int>(threadIdx.x);
    if (i < n) list.offer(hit_of(score_key(scores[i]), i));
    __syncthreads();
    if (*count + kLanes > capacity) list.shrink(WholeBlock());
    __syncthreads();  // the count has been looked at before anybody offers
  }
  list.shrink(WholeBlock());
  for (int i = static_cast<int>(threadIdx.x); i < task.best; i += kLanes)
    task.hits[int64_t{blockIdx.x} * task.best + i] = hits[i];
}

// PairSum of product_keys.h and the index; `none` comes last.
struct Pair {
  double high, low;
  int64_t index;

  __device__ bool before(const Pair& other) const {
    if ((index < 0) != (other.index < 0)) return other.index < 0;
    const bool lost = high != high, other_lost = other.high != other.high;
    if (lost != other_lost) return lost;
    if (!lost && high != other.high) return high > other.high;
    if (!lost && low != other.low) return low > other.low;
    return index < other.index;
  }
};

__device__ inline Pair pair_of(double a, double b, int64_t index) {
  const double high = __dadd_rn(a, b), part = __dadd_rn(high, -a);
  const double low =
      high - high == 0 ? __dadd_rn(__dadd_rn(a, -__dadd_rn(high, -part)), __dadd_rn(b, -part)) : 0;
  return {high, low, index};
}

// hits (heads, 2, rows, best) -> indices, weights (rows, heads, k).
// Limit: the barriers of a sort.
__global__ void __launch_bounds__(kLanes)
    best_pairs(KeysTask task, Pair* memory, int64_t capacity, bool in_shared) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t k = task.in.k, heads = task.in.heads(), n = task.in.keys();
  Shared shared;
  Pair* held = shared.take<Pair>(in_shared ? capacity : 0);
  int* begins = shared.take<int>(task.best + 1);  // where the pairs of each first key lie
  double* exponentials = shared.take<double>(k);
  double* total = shared.take<double>(1);
  Pair* pairs = in_shared ? held : memory + blockIdx.x * capacity;
  if (tid == 0) {
    begins[0] = 0;
    for (int a = 0; a < task.best; ++a)
      begins[a + 1] = begins[a] + static_cast<int>(min(int64_t{task.best}, k / (a + 1)));
  }
  __syncthreads();
  for (int64_t at = blockIdx.x; at < task.rows * heads; at += gridDim.x) {
    const int64_t row = quotient(at, heads), head = at - row * heads;
    const uint64_t* first = task.hits + (head * 2 * task.rows + row) * task.best;
    const uint64_t* second = first + task.rows * task.best;
    const float* first_scores = task.scores + (head * 2 * task.rows + row) * n;
    const float* second_scores = first_scores + task.rows * n;
    for (int64_t i = tid + begins[task.best]; i < capacity; i += kLanes) pairs[i] = {0, 0, -1};
    for (int a = tid; a < task.best; a += kLanes) {
      const auto i = static_cast<uint32_t>(first[a]);
      for (int b = 0; b < begins[a + 1] - begins[a]; ++b) {
        const auto j = static_cast<uint32_t>(second[b]);
        pairs[begins[a] + b] = pair_of(first_scores[i], second_scores[j], i * n + j);
      }
    }
    for (int64_t run = 2; run <= capacity; run *= 2)
      for (int64_t by = run / 2; by; by /= 2) {
        __syncthreads();
        for (int64_t p = tid; p < capacity / 2; p += kLanes) {
          const int64_t low = (p & ~(by - 1)) * 2 + (p & (by - 1)), high = low + by;
          const Pair x = pairs[low], y = pairs[high];
          if (y.before(x) == ((low & run) == 0)) {
            pairs[low] = y;
            pairs[high] = x;
          }
        }
      }
    __syncthreads();
    for (int64_t p = tid; p < k; p += kLanes)
      exponentials[p] = task.in.softmax
                            ? exp(__dmul_rn(task.in.scale, pairs[p].high - pairs[0].high))
                            : __dmul_rn(task.in.scale, pairs[p].high);
    __syncthreads();
    if (tid == 0) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += exponentials[p];
      *total = task.in.softmax ? sum : 1;
    }
    __syncthreads();
    const int64_t entry = ((task.first + row) * heads + head) * k;
    for (int64_t p = tid; p < k; p += kLanes) {
      task.out.indices[entry + p] = pairs[p].index;
      static_cast<float*>(task.out.weights)[entry + p] =
          static_cast<float>(exponentials[p] / *total);
    }
    __syncthreads();
  }
}

// indices, weights (groups, per group), values (n n, dv) -> out (groups, dv).
// Limit: memory, the rows of values.
__global__ void __launch_bounds__(kLanes) sum_values(ProductKeys in, ProductKeysOut out) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= in.groups() * in.dv()) return;
  const int64_t group = quotient(at, in.dv()), d = at - group * in.dv();
  const int64_t first = group * in.per_group(), last = first + in.per_group();
  const auto* weights = static_cast<const float*>(out.weights);
  float sum = 0;
#pragma unroll 2
  for (int64_t e = first; e < last; ++e)
    sum = __fadd_rn(sum, __fmul_rn(weights[e], float_at(in.values.data, in.values.dtype,
                                                        out.indices[e] * in.values.strides[0] +
                                                            d * in.values.strides[1])));
  write_float(out.out, in.values.dtype, at, sum);
}

int64_t pairs_of(int64_t best, int64_t k) {
  int64_t count = 0;
  for (int64_t a = 0; a < best; ++a) count += min(best, k / (a + 1));
  return count;
}

struct Space {
  int64_t group;  // rows
  int64_t capacity;
  float* scores;
  uint64_t* hits;
  Pair* pairs;

  Space(Pieces& pieces, int64_t rows, int64_t heads, int64_t keys, int64_t k) {
    const int64_t best = min(k, keys);
    group = max(int64_t{1}, min(rows, kScores / (2 * heads * keys)));
    capacity = power_of_two_from(pairs_of(best, k));
    scores = pieces.take<float>(group * 2 * heads * keys);
    hits = pieces.take<uint64_t>(group * 2 * heads * best);
    pairs =
        pieces.take<Pair>(capacity > kSharedPairs ? capacity * min(kPairBlocks, group * heads) : 0);
  }
};

}  // namespace

int64_t product_keys_scratch(int64_t rows, int64_t heads, int64_t keys, int64_t k) {
  Pieces pieces;
  Space(pieces, rows, heads, keys, k);
  return pieces.bytes();
}

void product_keys(const CudaStream& stream, const ProductKeys& in, const ProductKeysOut& out,
                  void* scratch) {
  const int64_t rows = in.rows(), heads = in.heads(), n = in.keys(), k = in.k;
  if (rows == 0) return;
  Pieces pieces(scratch);
  const Space space(pieces, rows, heads, n, k);
  KeysTask task{in, out, 0, 0, static_cast<int>(min(k, n)), space.scores, space.hits};
  const int capacity = power_of_two_from(task.best + kLanes);
  const bool in_shared = space.capacity <= kSharedPairs;
  for (; task.first < rows; task.first += space.group) {
    task.rows = min(space.group, rows - task.first);
    const int64_t row_tiles = ceil_div(task.rows, kTile), key_tiles = ceil_div(n, kTile);
    launch(stream, "pq: score_keys", score_keys,
           Grid{blocks_of(row_tiles * key_tiles * heads * 2), kLanes,
                2 * shared_bytes<float[kPitch]>(kDepth)},
           task, row_tiles, key_tiles);
    launch(
        stream, "pq: best_keys", best_keys,
        Grid{blocks_of(task.rows * heads * 2), kLanes,
             shared_bytes<uint64_t>(capacity) + shared_bytes<uint64_t>(1) + shared_bytes<int>(1)},
        task, capacity);
    launch(
        stream, "pq: best_pairs", best_pairs,
        Grid{blocks_of(in_shared ? task.rows * heads : min(kPairBlocks, task.rows * heads)), kLanes,
             shared_bytes<Pair>(in_shared ? space.capacity : 0) + shared_bytes<int>(task.best + 1) +
                 shared_bytes<double>(k) + shared_bytes<double>(1)},
        task, space.pairs, space.capacity, in_shared);
  }
  if (in.dv())
    launch(stream, "pq: sum_values", sum_values,
           Grid{blocks_of(ceil_div(in.groups() * in.dv(), kLanes)), kLanes}, in, out);
}

}  // namespace pentad::pq::cuda
