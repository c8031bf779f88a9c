// SPDX-License-Identifier: Apache-2.0
// Gradients of product-key memory, through the selected entries: of their weights by inner products,
// of queries by sums over ranks, of sub-keys and values by sorted entries (grouped_sum.cuh).
#include "pq/grouped_sum.cuh"
#include "pq/product_keys_cuda.h"

namespace pentad::pq::cuda {
namespace {

struct GradTask {
  ProductKeys in;
  ProductKeysGrad grad;
  float* d_scores;  // (rows, heads, k); first of the weights

  __device__ float weight(int64_t entry) const {
    return static_cast<const float*>(grad.weights)[entry];
  }
  __device__ float d_out(int64_t entry, int64_t d) const {
    const TensorView& g = grad.d_out;
    if (!g.data) return 0;
    const int64_t group = quotient(entry, in.per_group());
    return float_at(g.data, g.dtype, group * g.strides[0] + d * g.strides[1]);
  }
  // -1: there is no such value.
  __device__ int64_t value_of(int64_t entry) const {
    const int64_t value = grad.indices[entry];
    return value >= 0 && value < in.values.shape[0] ? value : -1;
  }
  __device__ int64_t subkey_of(int64_t value, int64_t half) const {
    const int64_t first = quotient(value, in.keys());
    return half ? value - first * in.keys() : first;
  }
};

// d_out (groups, dv), values (n n, dv) -> gradients of the weights (rows, heads, k): 16 lanes each.
// Limit: memory, the rows of values.
__global__ void __launch_bounds__(kLanes) entry_gradients(GradTask task, int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * (kLanes / 16) + static_cast<int>(threadIdx.x) / 16;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const int64_t entry = min(at, count - 1), value = task.value_of(entry);
  const TensorView& values = task.in.values;
  float sum = 0;
  if (value >= 0 && task.grad.d_out.data)
#pragma unroll 2
    for (int64_t d = lane; d < task.in.dv(); d += 16)
      sum = __fadd_rn(sum, __fmul_rn(task.d_out(entry, d),
                                     float_at(values.data, values.dtype,
                                              value * values.strides[0] + d * values.strides[1])));
  for (int by = 8; by; by /= 2) sum = __fadd_rn(sum, __shfl_down_sync(kFullWarp, sum, by, 16));
  if (lane || at >= count) return;
  if (task.grad.d_weights) sum += static_cast<const float*>(task.grad.d_weights)[entry];
  task.d_scores[entry] = sum;
}

// Gradients of weights -> of scores, a warp for each row and head.
// Limit: memory.
__global__ void __launch_bounds__(kLanes) score_gradients(GradTask task) {
  const int64_t row = int64_t{blockIdx.x} * (kLanes / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= task.in.rows() * task.in.heads()) return;
  const int64_t first = row * task.in.k;
  float mean = 0;
  if (task.in.softmax) {
    for (int64_t p = lane_of_warp(); p < task.in.k; p += 32)
      mean += task.weight(first + p) * task.d_scores[first + p];
    for (int by = 16; by; by /= 2) mean += __shfl_xor_sync(kFullWarp, mean, by);
  }
  const auto scale = static_cast<float>(task.in.scale);
  for (int64_t p = lane_of_warp(); p < task.in.k; p += 32) {
    float& own = task.d_scores[first + p];
    own = scale * (task.in.softmax ? task.weight(first + p) * (own - mean) : own);
  }
}

// d_scores (rows, heads, k), subkeys (heads, 2, n, half) -> d_q (rows, heads, 2 half).
// Limit: memory, the sub-keys from the caches.
__global__ void __launch_bounds__(kLanes) query_gradients(GradTask task, int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t width = task.in.half(), side = quotient(at, width), j = at - side * width;
  const int64_t row = side / 2, head = row - quotient(row, task.in.heads()) * task.in.heads();
  const TensorView& keys = task.in.subkeys;
  float sum = 0;
#pragma unroll 2
  for (int64_t p = 0; p < task.in.k; ++p) {
    const int64_t entry = row * task.in.k + p, value = task.value_of(entry);
    if (value < 0) continue;
    const int64_t key = task.subkey_of(value, side % 2);
    sum += task.d_scores[entry] * float_at(keys.data, keys.dtype,
                                           head * keys.strides[0] + side % 2 * keys.strides[1] +
                                               key * keys.strides[2] + j * keys.strides[3]);
  }
  write_float(task.grad.d_q, task.in.q.dtype, at, sum);
}

// indices (rows, heads, k) -> keys, items (2 * entries): the row of subkeys, and entry * 2 + half.
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    number_subkeys(GradTask task, int64_t count, uint32_t none, uint32_t* keys, uint32_t* items) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t entry = at / 2, value = task.value_of(entry), row = quotient(entry, task.in.k);
  const int64_t head = row - quotient(row, task.in.heads()) * task.in.heads();
  keys[at] = value < 0 ? none
                       : static_cast<uint32_t>((head * 2 + at % 2) * task.in.keys() +
                                               task.subkey_of(value, at % 2));
  items[at] = static_cast<uint32_t>(at);
}

// places or indices (rows, heads, k) -> keys, items (entries): the row of d_values, and the entry.
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    number_values(const int64_t* places, int64_t count, int64_t rows, uint32_t* keys,
                  uint32_t* items) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t place = places[at];
  keys[at] = static_cast<uint32_t>(place >= 0 && place < rows ? place : rows);
  items[at] = static_cast<uint32_t>(at);
}

struct SubkeyTerms {
  GradTask task;

  __device__ float operator()(uint32_t item, int64_t column) const {
    const int64_t entry = item / 2, place = quotient(entry, task.in.k);
    const int64_t row = quotient(place, task.in.heads()), head = place - row * task.in.heads();
    const TensorView& q = task.in.q;
    return __fmul_rn(task.d_scores[entry],
                     float_at(q.data, q.dtype,
                              row * q.strides[0] + head * q.strides[1] +
                                  (item % 2 * task.in.half() + column) * q.strides[2]));
  }
};

struct ValueTerms {
  GradTask task;

  __device__ float operator()(uint32_t item, int64_t column) const {
    return __fmul_rn(task.weight(item), task.d_out(item, column));
  }
};

struct Rows {
  void* out;
  DType dtype;
  int64_t width;

  __device__ void operator()(uint32_t key, int64_t column, float sum) const {
    write_float(out, dtype, key * width + column, sum);
  }
};

// out (count) of bytes.
// Limit: memory.
__global__ void __launch_bounds__(kLanes) zero_pairs(uint16_t* out, int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at < count) out[at] = 0;
}

void fill_zeros_of(const CudaStream& stream, void* out, DType dtype, int64_t count) {
  if (dtype == DType::f32) return fill_zeros(stream, static_cast<float*>(out), count);
  if (count)
    launch(stream, "pq: zero_pairs", zero_pairs, Grid{blocks_of(ceil_div(count, kLanes)), kLanes},
           static_cast<uint16_t*>(out), count);
}

struct Space {
  float* d_scores;
  SortSpace sort;
  float* partial;

  Space(Pieces& pieces, int64_t entries, int64_t half, int64_t dv)
      : d_scores(pieces.take<float>(entries)),
        sort(pieces, 2 * entries),
        partial(take_partial_sums(pieces, 2 * entries, max(half, dv))) {}
};

}  // namespace

int64_t product_keys_backward_scratch(int64_t rows, int64_t heads, int64_t keys, int64_t half,
                                      int64_t k, int64_t dv, int64_t value_rows) {
  check_groups(2 * rows * heads * k, max(value_rows, heads * 2 * keys));
  Pieces pieces;
  Space(pieces, rows * heads * k, half, dv);
  return pieces.bytes();
}

void product_keys_backward(const CudaStream& stream, const ProductKeys& in,
                           const ProductKeysGrad& grad, const int64_t* places, int64_t value_rows,
                           void* scratch) {
  const int64_t entries = in.entries(), half = in.half(), dv = in.dv();
  const int64_t subkeys = in.heads() * 2 * in.keys();
  if (grad.d_subkeys) fill_zeros_of(stream, grad.d_subkeys, in.subkeys.dtype, subkeys * half);
  if (grad.d_values) fill_zeros_of(stream, grad.d_values, in.values.dtype, value_rows * dv);
  if (entries == 0) return;
  Pieces pieces(scratch);
  const Space space(pieces, entries, half, dv);
  const GradTask task{in, grad, space.d_scores};
  if (grad.d_q || grad.d_subkeys) {
    launch(stream, "pq: entry_gradients", entry_gradients,
           Grid{blocks_of(ceil_div(entries, kLanes / 16)), kLanes}, task, entries);
    launch(stream, "pq: score_gradients", score_gradients,
           Grid{blocks_of(ceil_div(in.rows() * in.heads(), kLanes / 32)), kLanes}, task);
  }
  if (grad.d_q) {
    const int64_t count = in.rows() * in.heads() * 2 * half;
    launch(stream, "pq: query_gradients", query_gradients,
           Grid{blocks_of(ceil_div(count, kLanes)), kLanes}, task, count);
  }
  if (grad.d_subkeys) {
    launch(stream, "pq: number_subkeys", number_subkeys,
           Grid{blocks_of(ceil_div(2 * entries, kLanes)), kLanes}, task, 2 * entries,
           static_cast<uint32_t>(subkeys), space.sort.keys, space.sort.items);
    grouped_sum(stream, "pq: gradient of subkeys",
                sort_groups(stream, space.sort, 2 * entries, subkeys), half, SubkeyTerms{task},
                Rows{grad.d_subkeys, in.subkeys.dtype, half}, space.partial);
  }
  if (grad.d_values && grad.d_out.data) {
    launch(stream, "pq: number_values", number_values,
           Grid{blocks_of(ceil_div(entries, kLanes)), kLanes}, places ? places : grad.indices,
           entries, value_rows, space.sort.keys, space.sort.items);
    grouped_sum(stream, "pq: gradient of values",
                sort_groups(stream, space.sort, entries, value_rows), dv, ValueTerms{task},
                Rows{grad.d_values, in.values.dtype, dv}, space.partial);
  }
}

}  // namespace pentad::pq::cuda
