// SPDX-License-Identifier: Apache-2.0
// Codes as integers. A lane makes one number of the result; all are limited by memory.
#include "pq/codes_cuda.h"
#include "pq/pq_device.cuh"

namespace pentad::pq::cuda {
namespace {

constexpr int kSeeds = 32;  // of a launch: they are arguments of the kernel

// codes (n, M) -> packed (n, bytes).
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    pack_bytes(Codes codes, int nbits, int64_t bytes, int64_t count, uint8_t* packed) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t row = quotient(at, bytes), first = (at - row * bytes) * 8;
  const uint64_t mask = (uint64_t{1} << nbits) - 1;
  uint64_t byte = 0;
  for (int64_t m = quotient(first, nbits); m < codes.columns && m * nbits < first + 8; ++m) {
    const uint64_t code = mask & integer_at(codes.data, codes.dtype,
                                            row * codes.row_stride + m * codes.column_stride);
    const int64_t shift = m * nbits - first;  // from -15 to 7
    byte |= shift < 0 ? code >> -shift : code << shift;
  }
  packed[at] = static_cast<uint8_t>(byte);
}

// packed (n, bytes) -> out (n, M) uint8, or int32 for more than 8 bits.
// Limit: memory.
__global__ void __launch_bounds__(kLanes)
    unpack_bytes(const uint8_t* packed, int64_t row_stride, int64_t stride, int64_t columns,
                 int nbits, int64_t count, void* out) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t row = quotient(at, columns), first = (at - row * columns) * nbits;
  uint32_t bits = 0;
  for (int64_t byte = first / 8; byte * 8 < first + nbits; ++byte)
    bits |= static_cast<uint32_t>(packed[row * row_stride + byte * stride])
            << (8 * (byte - first / 8));
  const uint32_t code = bits >> first % 8 & ((1u << nbits) - 1);
  if (nbits <= 8) static_cast<uint8_t*>(out)[at] = static_cast<uint8_t>(code);
  else static_cast<int32_t*>(out)[at] = static_cast<int32_t>(code);
}

__host__ __device__ inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Columns [first, first + some) of `count`; keys are mixed seeds, or divisors of digits.
struct Columns {
  int64_t first, some, count;
  uint64_t keys[kSeeds];
  int64_t sizes[kSeeds];
};

// ids (n) -> out (n, count): hashes, or digits.
// Limit: memory, 8 bytes of a result.
__global__ void __launch_bounds__(kLanes)
    number_ids(Codes ids, Columns columns, bool hashes, int64_t* out) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  const int64_t row = quotient(at, columns.some), h = at - row * columns.some;
  if (row >= ids.rows) return;
  const uint64_t id = integer_at(ids.data, ids.dtype, row * ids.row_stride);
  const uint64_t key = columns.keys[h];
  const auto size = static_cast<uint64_t>(columns.sizes[h]);
  const uint64_t number = hashes ? (mix(id + key) >> 32) * size >> 32 : id / key % size;
  out[row * columns.count + columns.first + h] = static_cast<int64_t>(number);
}

void number(const CudaStream& stream, const Codes& ids, bool hashes, const uint64_t* keys,
            const int64_t* sizes, int64_t first, int64_t count, int64_t* out) {
  Columns columns{first, min(int64_t{kSeeds}, count - first), count, {}, {}};
  for (int64_t h = 0; h < columns.some; ++h)
    columns.keys[h] = keys[h], columns.sizes[h] = sizes[first + h];
  launch(stream, "pq: number_ids", number_ids,
         Grid{blocks_of(ceil_div(ids.rows * columns.some, kLanes)), kLanes}, ids, columns, hashes,
         out);
}

}  // namespace

void pack_codes(const CudaStream& stream, const Codes& codes, int nbits, uint8_t* packed) {
  const int64_t bytes = ceil_div(codes.columns * nbits, 8), count = codes.rows * bytes;
  if (count)
    launch(stream, "pq: pack_bytes", pack_bytes, Grid{blocks_of(ceil_div(count, kLanes)), kLanes},
           codes, nbits, bytes, count, packed);
}

void unpack_codes(const CudaStream& stream, const uint8_t* packed, int64_t row_stride,
                  int64_t stride, int64_t rows, int64_t columns, int nbits, void* out) {
  const int64_t count = rows * columns;
  if (count)
    launch(stream, "pq: unpack_bytes", unpack_bytes,
           Grid{blocks_of(ceil_div(count, kLanes)), kLanes}, packed, row_stride, stride, columns,
           nbits, count, out);
}

void hash_codes(const CudaStream& stream, const Codes& ids, const uint64_t* seeds,
                const int64_t* sizes, int64_t count, int64_t* out) {
  for (int64_t first = 0; ids.rows && first < count; first += kSeeds) {
    uint64_t keys[kSeeds] = {};
    for (int64_t h = 0; h < min(int64_t{kSeeds}, count - first); ++h)
      keys[h] = mix(seeds[first + h] + 0x9e3779b97f4a7c15);
    number(stream, ids, true, keys, sizes, first, count, out);
  }
}

void digits(const CudaStream& stream, const Codes& ids, const int64_t* sizes, int64_t count,
            int64_t* out) {
  constexpr uint64_t kMost = uint64_t{1} << 63;  // ids are less
  uint64_t product = 1;
  for (int64_t first = 0; ids.rows && first < count; first += kSeeds) {
    uint64_t keys[kSeeds] = {};
    for (int64_t h = 0; h < min(int64_t{kSeeds}, count - first); ++h) {
      keys[h] = product;
      const auto size = static_cast<uint64_t>(sizes[first + h]);
      product = product > kMost / size ? kMost : product * size;
    }
    number(stream, ids, false, keys, sizes, first, count, out);
  }
}

}  // namespace pentad::pq::cuda
