// SPDX-License-Identifier: Apache-2.0
// Gradients of lookups: of the tables by sorted codes (grouped_sum.cuh), of the weights by inner
// products.
#include "pq/grouped_sum.cuh"
#include "pq/lookup_cuda.h"
#include "pq/lookup_tables.cuh"

namespace pentad::pq::cuda {
namespace {

struct BackwardTask : LookupTask {
  DType dtype;  // of the tables
  const void* d_out;
  DType d_out_dtype;
  int64_t d_out_stride;
  const int32_t* bag_of;  // (n), with bags

  __device__ float entry(int64_t i, int64_t m, int64_t d) const {
    const DeviceTable table = tables[m];
    const int64_t code = code_below(codes, i, m, table.rows);
    return code < 0 ? not_a_number() : float_at(table.base + code * table.step, dtype, d);
  }
  __device__ float term(int64_t i, int64_t m, int64_t d) const {
    return __fmul_rn(weight(i, m), entry(i, m, d));
  }
  // s: of the mean, 1 / (M * rows of the bag).
  __device__ float scale(int64_t b) const {
    if (combine != Combine::mean) return 1;
    return __fdiv_rn(1.0f, static_cast<float>((last(b) - first(b)) * codes.columns));
  }
  // g(b) * rest(i, m), column d.
  __device__ float gradient(int64_t b, int64_t i, int64_t m, int64_t d) const {
    const int64_t from = combine == Combine::concat ? m * width : 0;
    const float grad = float_at(d_out, d_out_dtype, b * d_out_stride + from + d);
    if (combine != Combine::product) return grad;
    float left = 1, right = 1;
#pragma unroll 1  // the rare case, of much code
    for (int64_t j = 0; j < m; ++j) left = __fmul_rn(left, term(i, j, d));
#pragma unroll 1
    for (int64_t j = codes.columns - 1; j > m; --j) right = __fmul_rn(right, term(i, j, d));
    return __fmul_rn(grad, __fmul_rn(left, right));
  }
  // -1: the row is in no bag.
  __device__ int64_t bag(int64_t i) const { return bags ? bag_of[i] : i; }
};

// offsets (bags) -> the bag of each row (n), the last that begins at or before it.
// Limit: latency of a binary search.
__global__ void __launch_bounds__(kLanes) find_bags(LookupTask task, int32_t* bag_of) {
  const int64_t i = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (i >= task.codes.rows) return;
  int64_t low = 0, high = task.offsets.rows;  // bags before `low` begin at or before i
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (task.boundary(middle) <= i) low = middle + 1;
    else high = middle;
  }
  bag_of[i] = static_cast<int32_t>(low - 1);
}

// codes (n, M) -> keys, items (n * M): the row in all tables, and the code's place.
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    number_rows(BackwardTask task, int64_t count, uint32_t none, uint32_t* keys, uint32_t* items) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t i = quotient(at, task.codes.columns), m = at - i * task.codes.columns;
  const DeviceTable table = task.tables[m];
  const int64_t code = code_below(task.codes, i, m, table.rows);
  keys[at] = code < 0 || task.bag(i) < 0 ? none : static_cast<uint32_t>(table.first + code);
  items[at] = static_cast<uint32_t>(at);
}

struct TermGradients {
  BackwardTask task;

  __device__ float operator()(uint32_t item, int64_t column) const {
    const auto columns = static_cast<uint32_t>(task.codes.columns);
    const int64_t i = item / columns, m = item % columns, b = task.bag(i);
    const float grad = task.gradient(b, i, m, column);
    if (!task.weights && task.combine != Combine::mean) return grad;
    return __fmul_rn(grad, __fmul_rn(task.weight(i, m), task.scale(b)));
  }
};

struct TableRows {
  float* out;
  int64_t width;

  __device__ void operator()(uint32_t key, int64_t column, float sum) const {
    out[key * width + column] = sum;
  }
};

// d_out (outputs, columns), codes (n, M) -> d_weights (n, M): 16 lanes for each, a chain per lane,
// added in a tree.
// Limit: memory, the rows of d_out and of the tables.
__global__ void __launch_bounds__(kLanes)
    weight_gradients(BackwardTask task, int64_t count, float* d_weights) {
  const int64_t at = int64_t{blockIdx.x} * (kLanes / 16) + static_cast<int>(threadIdx.x) / 16;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int64_t i = quotient(min(at, count - 1), task.codes.columns);
  const int64_t m = min(at, count - 1) - i * task.codes.columns, b = task.bag(i);
  float sum = 0;
  if (b >= 0)
#pragma unroll 2
    for (int64_t d = lane; d < task.width; d += 16)
      sum = __fadd_rn(sum, __fmul_rn(task.gradient(b, i, m, d), task.entry(i, m, d)));
  for (int by = 8; by; by /= 2) sum = __fadd_rn(sum, __shfl_down_sync(kFullWarp, sum, by, 16));
  if (lane == 0 && at < count) d_weights[at] = b < 0 ? 0 : __fmul_rn(sum, task.scale(b));
}

struct Space {
  DeviceTable* tables;
  int32_t* bag_of;
  SortSpace sort;
  float* partial;

  Space(Pieces& pieces, int64_t codes, int64_t subspaces, int64_t width, bool d_tables)
      : tables(pieces.take<DeviceTable>(subspaces)),
        bag_of(pieces.take<int32_t>(codes)),
        sort(pieces, d_tables ? codes * subspaces : 0),
        partial(take_partial_sums(pieces, d_tables ? codes * subspaces : 0, width)) {}
};

}  // namespace

int64_t lookup_backward_scratch(int64_t codes, int64_t subspaces, int64_t rows, int64_t width,
                                bool d_tables) {
  if (d_tables) check_groups(codes * subspaces, rows);
  Pieces pieces;
  Space(pieces, codes, subspaces, width, d_tables);
  return pieces.bytes();
}

void lookup_backward(const CudaStream& stream, const Lookup& p, const Codes* offsets,
                     const LookupGradients& g, void* scratch) {
  const int64_t n = p.codes.rows, count = n * p.codes.columns;
  int64_t rows = 0;
  for (const Table& table : p.tables) rows += table.rows;
  if (g.d_tables) fill_zeros(stream, static_cast<float*>(g.d_tables), rows * p.width);
  if (count == 0) return;
  Pieces pieces(scratch);
  const Space space(pieces, n, p.codes.columns, p.width, g.d_tables != nullptr);
  const BackwardTask task{task_of(stream, p, offsets, space.tables),
                          p.dtype,
                          g.d_out,
                          g.dtype,
                          g.row_stride,
                          space.bag_of};
  if (offsets)
    launch(stream, "pq: find_bags", find_bags, Grid{blocks_of(ceil_div(n, kLanes)), kLanes}, task,
           space.bag_of);
  if (g.d_weights)
    launch(stream, "pq: weight_gradients", weight_gradients,
           Grid{blocks_of(ceil_div(count, kLanes / 16)), kLanes}, task, count,
           static_cast<float*>(g.d_weights));
  if (!g.d_tables) return;
  check_groups(count, rows);
  launch(stream, "pq: number_rows", number_rows, Grid{blocks_of(ceil_div(count, kLanes)), kLanes},
         task, count, static_cast<uint32_t>(rows), space.sort.keys, space.sort.items);
  grouped_sum(stream, "pq: lookup gradient", sort_groups(stream, space.sort, count, rows), p.width,
              TermGradients{task}, TableRows{static_cast<float*>(g.d_tables), p.width},
              space.partial);
}

}  // namespace pentad::pq::cuda
