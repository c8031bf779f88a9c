// SPDX-License-Identifier: Apache-2.0
// One token on a cache of matrix states.
#include "scan/matrix_scan_cuda.h"
#include "scan/matrix_tiles.cuh"

namespace pentad::scan::cuda {
namespace {

constexpr int kColumns = 32;               // of a block, one to a lane of each warp
constexpr int kWarps = kLanes / kColumns;  // share out the keys

// MatrixUpdate for a device.
struct Token {
  int64_t batch, heads, groups, keys, values, state_rows;
  bool delta, key_decay;
  float scale;
  Operand state, q, k, v, a, w, d, out;
  Integers rows;

  __device__ int64_t row(int64_t b) const {
    if (!rows.data) return b;
    return rows.wide ? static_cast<const int64_t*>(rows.data)[b * rows.stride]
                     : static_cast<const int32_t*>(rows.data)[b * rows.stride];
  }
};

// The sum over the warps, for each of the block's columns; parts: [kWarps][kColumns].
__device__ float add_warps(float x, float (*parts)[kColumns]) {
  const int lane = lane_of_warp();
  __syncthreads();
  parts[threadIdx.x / kColumns][lane] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp][lane];
  return sum;
}

// q, k (b, g, n), v (b, h, p), state (row, h, n, p) -> out (b, h, p), and the state in place.
// Limit: memory, the state once read and once written; the delta rule reads it twice, the second
// time from the cache.
__global__ void __launch_bounds__(kLanes) update_kernel(Token p, int64_t tiles) {
  const int64_t head = blockIdx.x / tiles % p.heads, b = blockIdx.x / tiles / p.heads;
  const int64_t column = blockIdx.x % tiles * kColumns + lane_of_warp();
  const int64_t group = head / (p.heads / p.groups), row = p.row(b);
  const int first = static_cast<int>(threadIdx.x) / kColumns;
  const bool inside = column < p.values;
  const int64_t to = b * p.out.stride[0] + head * p.out.stride[1] + column * p.out.stride[2];
  if (row < 0 || row >= p.state_rows) {
    if (inside && first == 0) put_number(p.out.data, p.out.dtype, to, 0.0f);
    return;
  }
  Shared shared;
  auto* q = shared.take<float>(p.keys);
  auto* k = shared.take<float>(p.keys);
  auto* a = shared.take<float>(p.keys);
  auto* parts = shared.take<float[kColumns]>(kWarps);
  const auto token = [&](const Operand& x, int64_t index, int64_t at) {
    return number(x.data, x.dtype, b * x.stride[0] + index * x.stride[1] + at * x.stride[2]);
  };
  for (int64_t n = threadIdx.x; n < p.keys; n += kLanes) {
    q[n] = token(p.q, group, n);
    k[n] = token(p.k, group, n);
    a[n] = p.a.data ? token(p.a, head, p.key_decay ? n : 0) : 1.0f;
  }
  __syncthreads();
  const Operand& s = p.state;
  const int64_t state = row * s.stride[0] + head * s.stride[1] + column * s.stride[3];
  const float v = inside ? token(p.v, head, column) : 0.0f;
  float rest = v;
  if (p.delta) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t n = first; n < p.keys; n += kWarps)
      if (inside) sum += k[n] * (a[n] * number(s.data, s.dtype, state + n * s.stride[2]));
    rest -= add_warps(sum, parts);
  }
  const float u = p.w.data ? token(p.w, head, 0) * rest : rest;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t n = first; n < p.keys; n += kWarps) {
    if (!inside) continue;
    const int64_t at = state + n * s.stride[2];
    const float x = a[n] * number(s.data, s.dtype, at) + k[n] * u;
    put_number(s.data, s.dtype, at, x);
    sum += q[n] * x;
  }
  sum = add_warps(sum, parts);
  if (!inside || first != 0) return;
  float out = p.scale * sum;
  if (p.d.data)
    out += number(p.d.data, p.d.dtype, head * p.d.stride[0] + column * p.d.stride[1]) * v;
  put_number(p.out.data, p.out.dtype, to, out);
}

}  // namespace

void matrix_update(const CudaStream& stream, const MatrixUpdate& p, const Integers& rows,
                   int64_t state_rows) {
  const int64_t tiles = ceil_div(p.values, kColumns), blocks = p.batch * p.heads * tiles;
  if (blocks == 0) return;
  const Token token{p.batch, p.heads,     p.groups,
                    p.keys,  p.values,    state_rows,
                    p.delta, p.key_decay, static_cast<float>(p.scale),
                    p.state, p.q,         p.k,
                    p.v,     p.a,         p.w,
                    p.d,     p.out,       rows};
  const size_t shared = 3 * shared_bytes<float>(p.keys) + shared_bytes<float[kColumns]>(kWarps);
  launch(stream, "matrix update", update_kernel, {blocks_of(blocks), kLanes, shared}, token, tiles);
}

}  // namespace pentad::scan::cuda
