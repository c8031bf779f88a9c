// SPDX-License-Identifier: Apache-2.0
// The nearest centroids: float32 products in tiles settle nearly all rows, within the bound that
// assign.h proves, and the definition in double settles the others.
#include "pq/assign_cuda.h"
#include "pq/pq_device.cuh"

namespace pentad::pq::cuda {
namespace {

constexpr int kTile = 64;             // rows, and centroids, of a block
constexpr int kDepth = 16;            // dimensions in shared memory at a time
constexpr int kPitch = kTile + 4;     // keeps 16-byte loads aligned and stores off one bank
constexpr int64_t kSettling = 1024;   // blocks that settle rows
constexpr int64_t kRanked = 1 << 22;  // costs that they hold, to rank them
constexpr double kInfinity = __builtin_huge_val();

struct AssignTask {
  Array3 x, books;
  Nearest metric;
  Assigned out;
  float* centre;   // (M, dim), l2
  float* moved;    // (M, K, dim): c' of assign.h
  float* bias;     // (M, K)
  double* norms;   // (M, K), cosine
  uint32_t* most;  // (M): bits of the largest |c'|
  uint32_t* open;  // how many rows are not settled
  int64_t* rows;   // these: i * M + m

  __device__ int64_t count() const { return x.shape[0] * x.shape[1]; }
  __device__ int64_t dim() const { return books.shape[2]; }
  __device__ int64_t centroids() const { return books.shape[1]; }
  __device__ float coordinate(int64_t i, int64_t m, int64_t j) const {
    return float_at(x.data, x.dtype, i * x.strides[0] + m * x.strides[1] + j * x.strides[2]);
  }
  __device__ float centroid(int64_t m, int64_t k, int64_t j) const {
    return float_at(books.data, books.dtype,
                    m * books.strides[0] + k * books.strides[1] + j * books.strides[2]);
  }
  // D_k, the bits of the definition.
  __device__ double cost(int64_t i, int64_t m, int64_t k) const {
    double sum = 0;
    for (int64_t j = 0; j < dim(); ++j) {
      const double a = coordinate(i, m, j), b = centroid(m, k, j), difference = __dadd_rn(a, -b);
      sum = __dadd_rn(sum,
                      metric == Nearest::l2 ? __dmul_rn(difference, difference) : __dmul_rn(a, b));
    }
    if (metric == Nearest::l2) return sum;
    if (metric == Nearest::ip) return -sum;
    const double norm = norms[m * centroids() + k];
    return norm > 0 ? -__ddiv_rn(sum, norm) : 0;
  }
  __device__ void write(int64_t at, int64_t code, double cost) const {
    if (out.wide) static_cast<int32_t*>(out.codes)[at] = static_cast<int32_t>(code);
    else static_cast<uint8_t*>(out.codes)[at] = static_cast<uint8_t>(code);
    if (out.distances) out.distances[at] = static_cast<float>(cost);
  }
};

// --- Codebooks --------------------------------------------------------------------------------------

// codebooks (M, K, dim) -> centre (M, dim).
// Limit: latency of a sum over the centroids.
__global__ void __launch_bounds__(kLanes) find_centres(AssignTask task) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at < task.books.shape[0]) task.most[at] = 0;
  if (at == 0) *task.open = 0;
  if (at >= task.books.shape[0] * task.dim()) return;
  const int64_t m = quotient(at, task.dim()), j = at - m * task.dim();
  double sum = 0;
  if (task.metric == Nearest::l2)
    for (int64_t k = 0; k < task.centroids(); ++k) sum += task.centroid(m, k, j);
  task.centre[at] = static_cast<float>(sum / static_cast<double>(task.centroids()));
}

// codebooks (M, K, dim) -> moved (M, K, dim), bias (M, K), norms (M, K), most (M).
// Limit: latency of a chain over the dimensions.
__global__ void __launch_bounds__(kLanes) move_centroids(AssignTask task) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= task.books.shape[0] * task.centroids()) return;
  const int64_t m = quotient(at, task.centroids()), k = at - m * task.centroids();
  float* moved = task.moved + at * task.dim();
  double norm = 1, squares = 0;
  if (task.metric == Nearest::cosine) {
    double sum = 0;
    for (int64_t j = 0; j < task.dim(); ++j) {
      const double c = task.centroid(m, k, j);
      sum = __dadd_rn(sum, __dmul_rn(c, c));
    }
    task.norms[at] = norm = __dsqrt_rn(sum);
  }
  for (int64_t j = 0; j < task.dim(); ++j) {
    const float c = task.centroid(m, k, j);
    float place = c;
    if (task.metric == Nearest::l2) place = c - task.centre[m * task.dim() + j];
    else if (task.metric == Nearest::cosine)
      place = norm > 0 ? static_cast<float>(static_cast<double>(c) / norm) : 0.0f;
    moved[j] = place;
    squares += static_cast<double>(place) * static_cast<double>(place);
  }
  task.bias[at] = task.metric == Nearest::l2 ? static_cast<float>(squares / 2) : 0.0f;
  const float length = static_cast<float>(sqrt(squares) * (1 + 0x1p-20));
  atomicMax(&task.most[m], __float_as_uint(length));  // not negative: floats rise with their bits
}

// --- Tiles ------------------------------------------------------------------------------------------

// 2 E of assign.h; infinity where float32 might overflow.
__device__ double doubt_of(double squares, double c, double d) {
  const double x = sqrt(squares * (1 + (d + 4) * 0x1p-23) + d * 0x1p-120);
  if (!(x * c + c * c + x * x < 0x1p125)) return kInfinity;
  return 2 * (1.0625 * 0x1p-24 * ((d + 4) * (x * c + c * c / 2) + (x + c) * (x + c)) +
              d * 0x1p-124 * (1 + x + c));
}

// Keeps the two best: the larger score, of equals the smaller k. (Then the row is not settled.)
struct TwoBest {
  float best, second;
  int32_t k;

  __device__ void offer(float score, int32_t place) {
    if (score > best || (score == best && place < k)) {
      second = best;
      best = score;
      k = place;
    } else if (!(score <= second)) {  // a NaN unsettles the row
      second = score;
    }
  }
};

// x (n, M, dim), moved (M, K, dim) -> the codes of settled rows, and a list of the others.
// Limit: multiplications, 16 of a lane for two loads of 16 bytes from shared memory.
__global__ void __launch_bounds__(kLanes) assign_tiles(AssignTask task, int64_t row_tiles) {
  const int tid = static_cast<int>(threadIdx.x), tx = tid % 16, ty = tid / 16;
  const int64_t m = quotient(blockIdx.x, row_tiles), count = task.x.shape[1];
  const int64_t first = (blockIdx.x - m * row_tiles) * kTile;
  const int64_t n = task.x.shape[0], dim = task.dim(), centroids = task.centroids();
  Shared shared;
  auto* rows = shared.take<float[kPitch]>(kDepth);  // x' and c', turned
  auto* books = shared.take<float[kPitch]>(kDepth);
  const float* centre = task.centre + m * dim;
  const float* moved = task.moved + m * centroids * dim;
  TwoBest found[4];
  float squares[4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float least = __uint_as_float(0xff800000u);
    found[r] = {least, least, 0x7fffffff};
  }
  for (int64_t k_first = 0; k_first < centroids; k_first += kTile) {
    float sums[4][4] = {};
    for (int64_t j_first = 0; j_first < dim; j_first += kDepth) {
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kTile * kDepth / kLanes; ++s) {
        const int j = tid % kDepth, r = tid / kDepth + s * (kLanes / kDepth);
        const int64_t column = j_first + j;
        const bool inside = column < dim;
        rows[j][r] =
            inside && first + r < n ? task.coordinate(first + r, m, column) - centre[column] : 0.0f;
        books[j][r] =
            inside && k_first + r < centroids ? moved[(k_first + r) * dim + column] : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
        const float4 a4 = *reinterpret_cast<const float4*>(&rows[j][ty * 4]);
        const float4 b4 = *reinterpret_cast<const float4*>(&books[j][tx * 4]);
        const float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (k_first == 0) squares[r] += a[r] * a[r];
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[r][c] += a[r] * b[c];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t k = k_first + tx * 4 + c;
      if (k >= centroids) continue;
      const float bias = task.bias[m * centroids + k];
#pragma unroll
      for (int r = 0; r < 4; ++r) found[r].offer(sums[r][c] - bias, static_cast<int32_t>(k));
    }
  }
  const double longest = __uint_as_float(task.most[m]);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    TwoBest& own = found[r];
    for (int by = 8; by; by /= 2) {  // the 16 lanes of a row
      const TwoBest other = {__shfl_xor_sync(kFullWarp, own.best, by),
                             __shfl_xor_sync(kFullWarp, own.second, by),
                             __shfl_xor_sync(kFullWarp, own.k, by)};
      own.offer(other.best, other.k);
      if (!(other.second <= own.second)) own.second = other.second;
    }
    const int64_t i = first + ty * 4 + r;
    if (tx || i >= n) continue;
    const double doubt = doubt_of(squares[r], longest, static_cast<double>(dim));
    const int64_t at = i * count + m;
    if (static_cast<double>(own.best) - static_cast<double>(own.second) > doubt)
      task.write(at, own.k, task.out.distances ? task.cost(i, m, own.k) : 0);
    else task.rows[atomicAdd(task.open, 1u)] = at;
  }
}

// --- The definition ---------------------------------------------------------------------------------

struct Costed {
  double cost;
  int64_t k;

  __device__ bool before(const Costed& other) const {
    return cost < other.cost || (cost == other.cost && k < other.k);
  }
};

__device__ inline Costed costed(const AssignTask& task, int64_t i, int64_t m, int64_t k) {
  const double cost = k < task.centroids() ? task.cost(i, m, k) : kInfinity;
  return {cost == cost ? cost : kInfinity, k};
}

// The rows of the list; x (n, M, dim), codebooks (M, K, dim) -> codes.
// Limit: operations in double.
__global__ void __launch_bounds__(kLanes) settle_rows(AssignTask task) {
  const int tid = static_cast<int>(threadIdx.x);
  Shared shared;
  Costed* bests = shared.take<Costed>(kLanes);
  const int64_t count = *task.open;
  for (int64_t entry = blockIdx.x; entry < count; entry += gridDim.x) {
    const int64_t at = task.rows[entry], i = quotient(at, task.x.shape[1]);
    const int64_t m = at - i * task.x.shape[1];
    Costed best = costed(task, i, m, tid);
    for (int64_t k = tid + kLanes; k < task.centroids(); k += kLanes) {
      const Costed other = costed(task, i, m, k);
      if (other.before(best)) best = other;
    }
    bests[tid] = best;
    for (int by = kLanes / 2; by; by /= 2) {
      __syncthreads();
      if (tid < by && bests[tid + by].before(bests[tid])) bests[tid] = bests[tid + by];
    }
    if (tid == 0) task.write(at, bests[0].k, bests[0].cost);
    __syncthreads();
  }
}

// Every row; x (n, M, dim), codebooks (M, K, dim) -> codes (n, M, top) by a bitonic sort of costs
// (blocks, capacity).
// Limit: operations in double, then the barriers of the sort.
__global__ void __launch_bounds__(kLanes)
    rank_rows(AssignTask task, Costed* memory, int64_t capacity) {
  const int tid = static_cast<int>(threadIdx.x);
  Costed* costs = memory + blockIdx.x * capacity;
  for (int64_t at = blockIdx.x; at < task.count(); at += gridDim.x) {
    const int64_t i = quotient(at, task.x.shape[1]), m = at - i * task.x.shape[1];
    for (int64_t k = tid; k < capacity; k += kLanes) costs[k] = costed(task, i, m, k);
    for (int64_t run = 2; run <= capacity; run *= 2)
      for (int64_t by = run / 2; by; by /= 2) {
        __syncthreads();
        for (int64_t p = tid; p < capacity / 2; p += kLanes) {
          const int64_t low = (p & ~(by - 1)) * 2 + (p & (by - 1)), high = low + by;
          const Costed a = costs[low], b = costs[high];
          if (b.before(a) == ((low & run) == 0)) {
            costs[low] = b;
            costs[high] = a;
          }
        }
      }
    __syncthreads();
    for (int64_t t = tid; t < task.out.top; t += kLanes)
      task.write(at * task.out.top + t, costs[t].k, costs[t].cost);
    __syncthreads();
  }
}

int64_t capacity_of(int64_t centroids) {
  int64_t capacity = 1;
  while (capacity < centroids) capacity *= 2;
  return capacity;
}

int64_t ranking_blocks(int64_t rows, int64_t centroids) {
  return max(int64_t{1}, min(rows, min(kSettling, kRanked / capacity_of(centroids))));
}

struct Space {
  AssignTask task{};
  Costed* costs = nullptr;

  Space(Pieces& pieces, int64_t n, int64_t books, int64_t centroids, int64_t dim, int64_t top) {
    task.centre = pieces.take<float>(books * dim);
    task.moved = pieces.take<float>(books * centroids * dim);
    task.bias = pieces.take<float>(books * centroids);
    task.norms = pieces.take<double>(books * centroids);
    task.most = pieces.take<uint32_t>(books);
    task.open = pieces.take<uint32_t>(1);
    if (top == 1) task.rows = pieces.take<int64_t>(n * books);
    else costs = pieces.take<Costed>(ranking_blocks(n * books, centroids) * capacity_of(centroids));
  }
};

}  // namespace

int64_t assign_scratch(int64_t n, int64_t books, int64_t centroids, int64_t dim, int64_t top) {
  Pieces pieces;
  Space(pieces, n, books, centroids, dim, top);
  return pieces.bytes();
}

void assign(const CudaStream& stream, const Array3& x, const Array3& codebooks, Nearest metric,
            const Assigned& out, void* scratch) {
  const int64_t n = x.shape[0], books = x.shape[1], dim = x.shape[2],
                centroids = codebooks.shape[1];
  if (n == 0 || books == 0) return;
  Pieces pieces(scratch);
  Space space(pieces, n, books, centroids, dim, out.top);
  AssignTask& task = space.task;
  task.x = x, task.books = codebooks, task.metric = metric, task.out = out;
  launch(stream, "pq: find_centres", find_centres,
         Grid{blocks_of(ceil_div(books * dim, kLanes)), kLanes}, task);
  launch(stream, "pq: move_centroids", move_centroids,
         Grid{blocks_of(ceil_div(books * centroids, kLanes)), kLanes}, task);
  if (out.top > 1) {
    launch(stream, "pq: rank_rows", rank_rows,
           Grid{blocks_of(ranking_blocks(n * books, centroids)), kLanes}, task, space.costs,
           capacity_of(centroids));
    return;
  }
  if (n * books > int64_t{0xffffffff})
    throw std::invalid_argument("a CUDA kernel cannot assign more than 2^32 - 1 codes at once");
  const int64_t row_tiles = ceil_div(n, kTile);
  launch(stream, "pq: assign_tiles", assign_tiles,
         Grid{blocks_of(row_tiles * books), kLanes, 2 * shared_bytes<float[kPitch]>(kDepth)}, task,
         row_tiles);
  launch(stream, "pq: settle_rows", settle_rows,
         Grid{blocks_of(min(kSettling, n * books)), kLanes, shared_bytes<Costed>(kLanes)}, task);
}

}  // namespace pentad::pq::cuda
