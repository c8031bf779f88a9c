// SPDX-License-Identifier: Apache-2.0
// All pairs of two sets of codes.
#include "hamming/hamming_tile.cuh"

namespace pentad::hamming::cuda {
namespace {

constexpr int kOnesLanes = 128;

// codes (rows, bytes) -> ones (rows) int32.
// Limit: memory, each byte is read once.
__global__ void __launch_bounds__(kOnesLanes) count_ones_kernel(Codes codes, int32_t* ones) {
  const int64_t row = int64_t{blockIdx.x} * kOnesLanes + threadIdx.x;
  if (row >= codes.rows) return;
  int count = 0;
  for (int piece = 0; piece * 16 < codes.bytes; ++piece) count += ones_of(codes.piece(row, piece));
  ones[row] = count;
}

// a (na, bytes), b (nb, bytes), ones of both -> out (na, nb) int32, or float32 for jaccard.
// Limit: the product of bits up to some 1000 bits a row (tensor cores, or 16 popcounts per clock and
// multiprocessor), below that the 4 bytes written per pair.
template <bool kTensor>
__global__ void __launch_bounds__(kTileLanes)
    distance_kernel(Codes a, Codes b, const int32_t* a_ones, const int32_t* b_ones, Metric metric,
                    int64_t b_tiles, void* out) {
  Shared shared;
  auto* buffers = shared.take<uint32_t[kPitch]>(2 * kTileRows);
  const int64_t a_first = blockIdx.x / b_tiles * kTileA, b_first = blockIdx.x % b_tiles * kTileB;
  const TilePairs pairs = common_ones<kTensor>(a, a_first, b, b_first, buffers);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = a_first + TilePairs::a_row(i), column = b_first + TilePairs::b_row(j, i);
      if (row >= a.rows || column >= b.rows) continue;
      const int both = pairs.c[j][i], sum = a_ones[row] + b_ones[column];
      const int64_t at = row * b.rows + column;
      if (metric == Metric::jaccard) static_cast<float*>(out)[at] = jaccard_of(both, sum - both);
      else static_cast<int32_t*>(out)[at] = metric == Metric::hamming ? sum - 2 * both : both;
    }
  }
}

}  // namespace

void count_ones(const CudaStream& stream, const Codes& codes, int32_t* ones) {
  const Grid grid{blocks_of(ceil_div(codes.rows, kOnesLanes)), kOnesLanes};
  launch(stream, "hamming: count_ones", count_ones_kernel, grid, codes, ones);
}

bool counts_on_tensor_cores(const CudaStream& stream, Product product) {
  return product == Product::of_device ? compute_capability(stream.device) < 100
                                       : product == Product::tensor;
}

int64_t distance_scratch(int64_t a_rows, int64_t b_rows) { return (a_rows + b_rows) * 4; }

void distance(const CudaStream& stream, const Matrix<const uint8_t>& a_codes,
              const Matrix<const uint8_t>& b_codes, Metric metric, void* out, void* scratch,
              Product product) {
  if (a_codes.rows == 0 || b_codes.rows == 0) return;
  const Codes a(a_codes), b(b_codes);
  auto* a_ones = static_cast<int32_t*>(scratch);
  int32_t* b_ones = a_ones + a.rows;
  count_ones(stream, a, a_ones);
  count_ones(stream, b, b_ones);
  const int64_t b_tiles = ceil_div(b.rows, kTileB);
  const Grid grid{blocks_of(ceil_div(a.rows, kTileA) * b_tiles), kTileLanes, kTileShared};
  const bool tensor = counts_on_tensor_cores(stream, product);
  launch(stream, "hamming: distance", tensor ? distance_kernel<true> : distance_kernel<false>, grid,
         a, b, a_ones, b_ones, metric, b_tiles, out);
}

}  // namespace pentad::hamming::cuda
