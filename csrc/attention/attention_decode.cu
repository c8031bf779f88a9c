// SPDX-License-Identifier: Apache-2.0
// Decoding: the query rows of a KV head (its group's heads times the queries) against its keys,
// which stay where they are, in pages or not. The keys are split over blocks; each leaves a partial
// softmax (maximum, sum, weighted values), and a second kernel merges these in the order of the keys.
#include "attention/attention_cache.cuh"
#include "attention/attention_decode_products.cuh"
#include "common/cp_async.cuh"

namespace pentad::attention::cuda {
namespace {

constexpr float kInfinity = HUGE_VALF;
constexpr float kNan = NAN;

// --- The task -----------------------------------------------------------------------------------------

// Blocks that splitting aims at, whatever the device, so that the bits do not depend on it: enough
// for several waves of today's largest.
constexpr int64_t kBlocks = 1024;
constexpr int64_t kMostSplits = 128;
constexpr int kLeastKeys = 256;  // of a split
constexpr int kSplitUnit = 64;   // keys; a multiple of every tile

struct CacheRows {
  Operand at;
  int dim, padded;  // padded: what is filled, with zeros from dim on
  bool pieces;      // rows begin at multiples of 16 bytes
};

struct DecodeTask {
  Caches caches;
  CacheRows k, v;
  Operand q, out, lse;
  Rules rules;
  int kv_heads, group, queries;
  int left, right;
  int rows, row_tiles;      // of a KV head: group times queries
  int splits, most_splits;  // of the grid, of any capacity
  float* partial;           // (pair, row tile, split, row, value_dim)
  float* sums;              // (pair, row tile, split, row, 2): maximum in base 2, sum

  explicit DecodeTask(const Problem& p) : rules(p) {}
};

// Of which the last may be shorter.
__device__ int pieces_of(int all, int piece) { return (all + piece - 1) / piece; }

// The keys that rows [first, first + count) of a KV head see by the window, in parts.
struct KeyParts {
  int begin, end, part, parts;

  __device__ KeyParts(const DecodeTask& task, int length, int first, int count) {
    int low = first % task.queries, high = (first + count - 1) % task.queries;
    if (first / task.queries != (first + count - 1) / task.queries)
      low = 0, high = task.queries - 1;
    const int offset = length - task.queries;
    begin = max(0, offset + low - task.left);
    end = min(length, offset + high + task.right + 1);
    const int keys = max(0, end - begin);
    part = max(pieces_of(pieces_of(keys, task.most_splits), kSplitUnit) * kSplitUnit, kLeastKeys);
    parts = max(1, pieces_of(keys, part));
  }
};

__device__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays

// --- Tiles of keys and values -------------------------------------------------------------------------

// Keys [first, first + count) of a sequence to `tile` (kKeys, dim), zeros behind the last; adjacent
// lanes have adjacent pieces of a row.
template <class T, int kWidth, int kKeys, int kStride>
__device__ void load_rows(const DecodeTask& task, const CacheRows& x, const CachedKeys& sequence,
                          int64_t b, int h, int first, int count, T* tile) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = kWidth / kPiece;
  const int tid = static_cast<int>(threadIdx.x), d = tid % kPieces * kPiece;
  if (d >= x.padded) return;
  const int64_t* stride = x.at.stride;
  const int room = min(kPiece, x.dim - d);  // may be negative
  const auto* base = static_cast<const T*>(x.at.data);
  const auto load = [&](int key, const auto& piece) {
    CachePlace place{0, 0, true};
    if (key < count) place = sequence.place(task.caches, b, first + key);
    const bool some = key < count && room > 0;
    const T* from = base;
    if (some)
      from += place.outer * stride[0] + h * stride[1] + place.inner * stride[2] + d * stride[3];
    T* to = tile + key * kStride + d;
    if (place.exists) piece(to, from, some ? room : 0);
    else *reinterpret_cast<uint4*>(to) = {0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff};  // NaN
  };
  if (x.pieces) {
#pragma unroll
    for (int i = 0; i < kKeys * kPieces / kLanes; ++i)
      load(tid / kPieces + i * (kLanes / kPieces), [](T* to, const T* from, int elements) {
        cp_async(to, from, elements * static_cast<int>(sizeof(T)));
      });
  } else {
#pragma unroll 1
    for (int key = tid / kPieces; key < kKeys; key += kLanes / kPieces)
      load(key, [&](T* to, const T* from, int elements) {
#pragma unroll 1
        for (int i = 0; i < kPiece; ++i)
          if (i < elements) to[i] = from[i * stride[3]];
          else to[i] = from_float<T>(0.0f);
      });
  }
}

// --- The ends of a row --------------------------------------------------------------------------------

// 1 / l, or 0 for a row that got nothing; writes the row's lse.
__device__ float finish_row(const DecodeTask& task, int64_t b, int h, int i, float m, float l,
                            bool write) {
  if (write && task.lse.data) {
    const double lse = m == kInfinity ? kInfinity
                       : l == 0.0f    ? -kInfinity
                                      : (static_cast<double>(m) + log2f(l)) * kLn2;
    const int64_t* stride = task.lse.stride;
    const int64_t n = b * stride[0] + h * stride[1] + i * stride[2];
    if (task.lse.dtype == DType::f64) static_cast<double*>(task.lse.data)[n] = lse;
    else static_cast<float*>(task.lse.data)[n] = static_cast<float>(lse);
  }
  const bool nothing = l == 0.0f || (task.rules.sink && task.rules.sink[h] == kInfinity);
  return nothing ? 0.0f : 1.0f / l;
}

template <class T>
__device__ void write_out(const DecodeTask& task, int64_t b, int h, int i, int d, float sum,
                          float factor) {
  const int64_t* stride = task.out.stride;
  static_cast<T*>(task.out.data)[b * stride[0] + h * stride[1] + i * stride[2] + d * stride[3]] =
      from_float<T>(factor == 0.0f ? 0.0f : sum * factor);  // 0 * NaN may be the sum
}

// --- The kernels --------------------------------------------------------------------------------------

// q (batch, heads, queries, dim), caches -> out (batch, heads, queries, value_dim), lse; or the
// partial sums of one split of the keys.
// Limit: memory, 2 (dim + value_dim) bytes a key in 16 bits: copies of the next tile are under way
// while this one is multiplied, in each of the blocks of a multiprocessor (three at dim 128).
template <class T, int kWidth>
__global__ void __launch_bounds__(kLanes, 4) decode_kernel(DecodeTask task) {
  using P = typename ProductsOf<T, kWidth>::type;
  constexpr int kRows = P::kRows, kKeys = P::kKeys;
  constexpr int kLanesOfRow = kLanes / kRows, kEach = kKeys / kLanesOfRow;
  constexpr int kScoreStride = kKeys + kLanesOfRow, kPStride = kKeys + 8;
  const int tid = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int row_tile = block % task.row_tiles, rest = block / task.row_tiles;
  const int split = rest % task.splits, pair = rest / task.splits;
  const int b = pair / task.kv_heads, kv_head = pair % task.kv_heads;
  const int first_row = row_tile * kRows, rows = min(kRows, task.rows - first_row);

  const CachedKeys sequence(task.caches, b, 0);
  const KeyParts keys(task, sequence.length, first_row, rows);
  if (split >= keys.parts) return;
  const int begin = keys.begin + split * keys.part, end = min(begin + keys.part, keys.end);

  Shared shared;
  T* const q = shared.take<T>(kRows * P::kKeyStride);
  T* const k_even = shared.take<T>(kKeys * P::kKeyStride);
  T* const k_odd = shared.take<T>(kKeys * P::kKeyStride);
  T* const v_even = shared.take<T>(kKeys * P::kValueStride);
  T* const v_odd = shared.take<T>(kKeys * P::kValueStride);
  auto* scores = shared.take<float>(kRows * kScoreStride);
  T* const p = shared.take<T>(kRows * kPStride);
  auto* alpha = shared.take<float>(kRows);

  const auto load = [&](int first, T* k, T* v) {
    load_rows<T, kWidth, kKeys, P::kKeyStride>(task, task.k, sequence, b, kv_head, first,
                                               end - first, k);
    load_rows<T, kWidth, kKeys, P::kValueStride>(task, task.v, sequence, b, kv_head, first,
                                                 end - first, v);
    cp_async_commit();
  };
  if (begin < end) load(begin, k_even, v_even);

#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    const int64_t* stride = task.q.stride;
    const int h = kv_head * task.group + (first_row + r) / task.queries;
    const int i = (first_row + r) % task.queries;
    const auto* from =
        static_cast<const T*>(task.q.data) + b * stride[0] + h * stride[1] + i * stride[2];
    for (int d = tid; d < task.k.padded; d += kLanes)
      if (r < rows && d < task.k.dim) q[r * P::kKeyStride + d] = from[d * stride[3]];
      else q[r * P::kKeyStride + d] = from_float<T>(0.0f);
  }
  for (int n = tid; n < kRows * kPStride; n += kLanes) p[n] = from_float<T>(0.0f);

  // This lane's row, of which it has every kLanesOfRow-th score.
  const int row = tid / kLanesOfRow, part = tid % kLanesOfRow;
  const int h = kv_head * task.group + (first_row + row) / task.queries;
  const int i = (first_row + row) % task.queries;
  const HeadRules rules(task.rules, b, row < rows ? h : 0, task.queries, sequence.length, 0);
  int key_begin, key_last;
  rules.keys_of(i, &key_begin, &key_last);
  float m = -kInfinity, l = 0.0f;  // the maximum in base 2; this lane's part of the sum
  if (!sequence.valid) {
    m = l = kNan;
  } else if (task.rules.sink && split == 0 && row < rows) {
    m = task.rules.sink[h] * kLog2e;  // a key without a value
    if (part == 0 && is_finite(m)) l = 1.0f;
  }
  const bool modified = task.rules.modify() || task.rules.choose();
  P products;
  bool odd = false;
  for (int j = begin; j < end; j += kKeys, odd = !odd) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody looks at the other one any more
    const T *k = odd ? k_odd : k_even, *v = odd ? v_odd : v_even;
    if (j + kKeys < end) load(j + kKeys, odd ? k_even : k_odd, odd ? v_even : v_odd);
    const int count = min(kKeys, end - j);
    P::scores(q, k, rows, task.k.padded, scores, kScoreStride);
    __syncthreads();

    bool hidden = false;
    if (row < rows) {
      float* const own = scores + row * kScoreStride + part;
      uint32_t seen = 0;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int key = part + e * kLanesOfRow;
        const bool sees = j + key >= key_begin && j + key <= key_last;
        seen |= static_cast<uint32_t>(key < count && sees) << e;
      }
      if (modified) {
#pragma unroll 1
        for (int e = 0; e < kEach; ++e) {
          const int at = j + part + e * kLanesOfRow;
          float slope, *const score = own + e * kLanesOfRow;
          if (!(seen >> e & 1)) continue;
          if (rules.chooses(i, at)) *score = rules.score(*score, i, at, &slope);
          else seen &= ~(1u << e);
        }
      }
      const float factor = modified ? 1.0f : task.rules.scale_log2;
      float s[kEach], most = -kInfinity;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        s[e] = seen >> e & 1 ? own[e * kLanesOfRow] * factor : -kInfinity;
        hidden |= part + e * kLanesOfRow < count && !(seen >> e & 1);
        most = larger(s[e], most);
      }
      // Rows past the last leave whole groups of lanes out.
      constexpr uint32_t kGroup = kLanesOfRow == 16 ? 0xffff : 0xff;
      const uint32_t group = kGroup << (lane_of_warp() / kLanesOfRow * kLanesOfRow);
#pragma unroll
      for (int by = kLanesOfRow / 2; by; by /= 2)
        most = larger(__shfl_xor_sync(group, most, by), most);
      const float next = larger(m, most), base = next == -kInfinity ? 0.0f : next;
      const float shrink = exp2f(m - base);
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float weight = seen >> e & 1 ? exp2f(s[e] - base) : -0.0f;
        sum += weight;
        p[row * kPStride + part + e * kLanesOfRow] = from_float<T>(weight);
      }
      l = l * shrink + sum;
      m = next;
      if (part == 0) alpha[row] = shrink;
    } else if (part == 0) {
      alpha[row] = 0.0f;
    }

    // A hidden value must not reach the sums, and 0 * NaN would.
    bool exact = __syncthreads_or(hidden);
    if (exact) {
      bool infinite = false;
#pragma unroll 1
      for (int key = 0; key < count; ++key)
        for (int d = tid; d < task.v.dim; d += kLanes)
          infinite |= !is_finite(to_float(v[key * P::kValueStride + d]));
      exact = __syncthreads_or(infinite);
    }
    products.scale(alpha);
    if (!exact) {
      products.values(p, kPStride, v, rows, task.v.dim);
    } else {
#pragma unroll 1
      for (int key = 0; key < count; ++key)
        products.each([&](float& o, int r, int d) {
          const float weight = to_float(p[r * kPStride + key]);
          if (is_seen(weight)) o += weight * to_float(v[key * P::kValueStride + d]);
        });
    }
  }

#pragma unroll
  for (int by = kLanesOfRow / 2; by; by /= 2) l += __shfl_xor_sync(kFullWarp, l, by);
  const int64_t task_row =
      ((int64_t{pair} * task.row_tiles + row_tile) * task.splits + split) * kRows;
  const bool direct = task.splits == 1;
  __syncthreads();  // alpha and the keys are free
  static_assert(kRows * kWidth * sizeof(float) <= kKeys * P::kKeyStride * sizeof(T));
  auto* const sums = reinterpret_cast<float*>(k_even);
  products.each([&](float& o, int r, int d) { sums[r * kWidth + d] = o; });
  if (row < rows && direct) {
    const float factor = finish_row(task, b, h, i, m, l, part == 0);
    if (part == 0) alpha[row] = factor;
  } else if (row < rows && part == 0) {
    task.sums[(task_row + row) * 2] = m;
    task.sums[(task_row + row) * 2 + 1] = l;
  }
  __syncthreads();
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const int h = kv_head * task.group + (first_row + r) / task.queries;
    const int i = (first_row + r) % task.queries;
    for (int d = tid; d < task.v.dim; d += kLanes)
      if (direct) write_out<T>(task, b, h, i, d, sums[r * kWidth + d], alpha[r]);
      else task.partial[(task_row + r) * task.v.dim + d] = sums[r * kWidth + d];
  }
}

// partial, sums -> out, lse: a block for a row.
// Limit: latency; the partial sums come from the cache.
constexpr int kMergeLanes = 256, kMergeWarps = kMergeLanes / 32, kMergeColumns = 128;

template <class T, int kRows>
__global__ void __launch_bounds__(kMergeLanes) merge_kernel(DecodeTask task) {
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / 32;
  const int row = static_cast<int>(blockIdx.x) % task.rows;
  const int pair = static_cast<int>(blockIdx.x) / task.rows;
  const int b = pair / task.kv_heads, kv_head = pair % task.kv_heads;
  const int h = kv_head * task.group + row / task.queries, i = row % task.queries;
  const int row_tile = row / kRows, first_row = row_tile * kRows;
  const CachedKeys sequence(task.caches, b, 0);
  const int parts =
      KeyParts(task, sequence.length, first_row, min(kRows, task.rows - first_row)).parts;
  const auto row_of = [&](int split) {
    return ((int64_t{pair} * task.row_tiles + row_tile) * task.splits + split) * kRows +
           row % kRows;
  };
  Shared shared;
  auto* sums = shared.take<float[kMergeColumns]>(kMergeWarps);
  float m = -kInfinity, l = 0.0f;
  for (int s = lane; s < parts; s += 32) m = larger(task.sums[row_of(s) * 2], m);
#pragma unroll
  for (int by = 16; by; by /= 2) m = larger(__shfl_xor_sync(kFullWarp, m, by), m);
  const float base = m == -kInfinity ? 0.0f : m;
  for (int s = lane; s < parts; s += 32)
    l += task.sums[row_of(s) * 2 + 1] * exp2f(task.sums[row_of(s) * 2] - base);
#pragma unroll
  for (int by = 16; by; by /= 2) l += __shfl_xor_sync(kFullWarp, l, by);
  const float factor = finish_row(task, b, h, i, m, l, threadIdx.x == 0);

  for (int first = 0; first < task.v.dim; first += kMergeColumns) {
    float sum[kMergeColumns / 32] = {};
    for (int s = warp; s < parts; s += kMergeWarps) {
      const float weight = exp2f(task.sums[row_of(s) * 2] - base);
      const float* from = task.partial + row_of(s) * task.v.dim + first;
#pragma unroll
      for (int c = 0; c < kMergeColumns / 32; ++c)
        if (first + lane + c * 32 < task.v.dim) sum[c] += from[lane + c * 32] * weight;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kMergeColumns / 32; ++c) sums[warp][lane + c * 32] = sum[c];
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    if (column < kMergeColumns && first + column < task.v.dim) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kMergeWarps; ++w) total += sums[w][column];
      write_out<T>(task, b, h, i, first + column, total, factor);
    }
  }
}

// --- Launches -----------------------------------------------------------------------------------------

int rows_of_tile(int64_t element_bytes) { return element_bytes == 2 ? 16 : 8; }

struct Splits {
  int64_t row_tiles, most, of_grid;

  Splits(int64_t pairs, int64_t rows, int64_t capacity, int64_t element_bytes) {
    row_tiles = ceil_div(rows, rows_of_tile(element_bytes));
    most = min(kMostSplits, ceil_div(kBlocks, max(int64_t{1}, pairs * row_tiles)));
    of_grid = max(int64_t{1}, min(most, ceil_div(capacity, kLeastKeys)));
  }
};

template <class T, int kWidth>
void run(const CudaStream& stream, const DecodeTask& task, int64_t pairs) {
  using P = typename ProductsOf<T, kWidth>::type;
  constexpr int kScoreStride = P::kKeys + kLanes / P::kRows, kPStride = P::kKeys + 8;
  const size_t shared = shared_bytes<T>(P::kRows * P::kKeyStride) +
                        2 * shared_bytes<T>(P::kKeys * P::kKeyStride) +
                        2 * shared_bytes<T>(P::kKeys * P::kValueStride) +
                        shared_bytes<float>(P::kRows * kScoreStride) +
                        shared_bytes<T>(P::kRows * kPStride) + shared_bytes<float>(P::kRows);
  const Grid grid{blocks_of(pairs * task.splits * task.row_tiles), kLanes, shared};
  launch(stream, "attention: decode", decode_kernel<T, kWidth>, grid, task);
  if (task.splits == 1) return;
  const Grid merge{blocks_of(pairs * task.rows), kMergeLanes,
                   shared_bytes<float[kMergeColumns]>(kMergeWarps)};
  launch(stream, "attention: merge splits", merge_kernel<T, P::kRows>, merge, task);
}

template <class T>
void run_width(const CudaStream& stream, const DecodeTask& task, int64_t pairs) {
  const int width = max(task.k.dim, task.v.dim);
  if (width <= 64) run<T, 64>(stream, task, pairs);
  else if (width <= 128) run<T, 128>(stream, task, pairs);
  else if (width <= 256) run<T, 256>(stream, task, pairs);
  else run<T, 512>(stream, task, pairs);
}

}  // namespace

int64_t decode_scratch(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                       int64_t capacity, int64_t value_dim, int64_t element_bytes) {
  const int64_t pairs = batch * kv_heads;
  if (pairs * queries == 0) return 0;
  const Splits splits(pairs, heads / kv_heads * queries, capacity, element_bytes);
  if (splits.of_grid == 1) return 0;
  return pairs * splits.row_tiles * splits.of_grid * rows_of_tile(element_bytes) * (value_dim + 2) *
         4;
}

void decode(const CudaStream& stream, const Problem& p, const Caches& caches,
            const Outputs& outputs, void* scratch) {
  const int64_t pairs = p.batch * p.kv_heads, element = size_of(p.q.dtype);
  if (pairs * p.max_q == 0) return;
  DecodeTask task(p);
  task.caches = caches;
  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const int unit = element == 2 ? 16 : 4, piece = static_cast<int>(16 / element);
  task.k = {p.k, dim, (dim + unit - 1) / unit * unit, has_pieces(p.k)};
  task.v = {p.v, value_dim, (value_dim + piece - 1) / piece * piece, has_pieces(p.v)};
  task.q = p.q;
  task.out = outputs.out;
  task.lse = outputs.lse;
  position_of(caches.capacity, "positions of a cache");
  task.kv_heads = position_of(p.kv_heads, "heads");
  task.rows = position_of(p.group() * p.max_q, "queries of a head of the keys");
  task.group = static_cast<int>(p.group());
  task.queries = static_cast<int>(p.max_q);
  task.left = static_cast<int>(min(p.left, int64_t{kMostPositions}));
  task.right = static_cast<int>(min(p.right, int64_t{kMostPositions}));
  const Splits splits(pairs, task.rows, caches.capacity, element);
  task.row_tiles = static_cast<int>(splits.row_tiles);
  task.splits = static_cast<int>(splits.of_grid);
  task.most_splits = static_cast<int>(splits.most);
  task.partial = static_cast<float*>(scratch);
  task.sums =
      task.partial + pairs * task.row_tiles * task.splits * rows_of_tile(element) * value_dim;
  if (p.q.dtype == DType::f32) run_width<float>(stream, task, pairs);
  else if (p.q.dtype == DType::f16) run_width<__half>(stream, task, pairs);
  else run_width<__nv_bfloat16>(stream, task, pairs);
}

}  // namespace pentad::attention::cuda
