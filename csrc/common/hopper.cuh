// SPDX-License-Identifier: Apache-2.0
// What Hopper (sm_90a) has for products of tiles: barriers in shared memory that copies complete, bulk
// copies of tiles of a tensor (TMA), and products by four warps that read shared memory (wgmma). A
// kernel of these is a pipeline: a producer asks for tiles, consumers wait for them and multiply.
//
// On the CPU each is done from the same addresses, swizzles and fragments: copies and products happen
// as late as they may, or as early (executor.h), so that a missing wait shows. What is missing there:
// fences (between what lanes write and what wgmma reads) and the number of registers.
//
// Tiles are bf16 or fp16 in panels of 64 columns: a row is 128 bytes, and its 16-byte chunks lie
// at chunk ^ (row % 8), "128-byte swizzle", so that neither rows nor columns meet bank conflicts. A
// panel begins at a multiple of 1,024 bytes.
#pragma once
#include "common/cuda_launch.cuh"
#include "common/tensor_view.h"
#if defined(__CUDACC__)
#include <cuda.h>  // CUtensorMap; nothing of the driver's library is linked
#endif

namespace pentad::hopper {

constexpr int kPanel = 64;  // columns
constexpr size_t kTileAlignment = 1024;

// Whether the device has all this; the CPU's executor does.
bool runs_on(int device);

// --- Barriers that count arrivals and bytes ---------------------------------------------------------

// In shared memory. A phase ends when all arrivals and all expected bytes have come; phases are told
// apart by their parity, beginning with 0.
struct Barrier {
  uint64_t state;

  __device__ void init(int arrivals);  // by one lane; then publish_barriers()
  __device__ void arrive();
  __device__ void arrive_expecting(int bytes);  // of copies that this phase waits for
  __device__ void wait(int parity);             // until the phase of this parity has ended
};
// Behind init(), by all lanes of the block.
__device__ void publish_barriers();

// --- Tiles of a tensor ------------------------------------------------------------------------------

// A 4-D tensor of 16-bit elements, its innermost dimension contiguous, and the box of a copy:
// kPanel elements by `rows` of the next dimension. A parameter of a kernel is
// `const __grid_constant__ TileMap`.
struct TileMap {
#if defined(__CUDACC__)
  CUtensorMap map;
#else
  const void* data;
  int64_t size[4], stride[4];  // strides in bytes
  int rows;
#endif
};

// Whether a tensor can be copied by tiles; strides in elements, those of dimensions of size 1 unused.
inline bool can_tile(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4]) {
  bool can = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[0] == 1;
  for (int i = 0; i < 4; ++i) can = can && size[i] >= 1 && size[i] < int64_t{1} << 31;
  for (int i = 1; i < 4; ++i)
    can = can &&
          (size[i] == 1 || (stride[i] % 8 == 0 && stride[i] > 0 && stride[i] < int64_t{1} << 38));
  return can;
}
TileMap tile_map(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4], int rows);

// Copies the box at these coordinates, zeros where it leaves the tensor, and counts
// kPanel * rows * 2 bytes at the barrier. By one lane.
__device__ void copy_tile(void* shared, const TileMap& map, Barrier* barrier, int x, int y, int z,
                          int w);

// --- Products by a warpgroup ------------------------------------------------------------------------

// Where an operand lies in shared memory. Rows of the inner dimension ("k-major", as the queries and
// the keys of a score): `stride` bytes between groups of 8 rows. Columns of it ("transposed", as the
// values): `stride` between groups of 8 keys, `panel` between panels.
class Operand {
 public:
  __device__ Operand(const void* shared, int stride, int panel = 16);
  __device__ Operand advanced(int bytes) const;
#if defined(__CUDACC__)
  uint64_t descriptor;
#else
  const std::byte* start;
  int stride, panel;
#endif

 private:
  Operand() = default;
};

// c (64, N) += a (64, 16) b (16, N), by the four warps of a warpgroup; c begins at zero unless
// `accumulate`. With w, lane the warp and lane in it, g = lane / 4, t = lane % 4, c holds rows
// 16 w + g and 16 w + g + 8 as mma.cuh has it, four numbers per 8 columns. From begin() to the end of
// wait() neither c nor a may be touched.
//   begin(); product(...); product(...); commit(); wait<0>();
template <bool bf16, bool b_transposed = false, int kRegisters>
__device__ void product(float (&c)[kRegisters], const Operand& a, const Operand& b,
                        bool accumulate = true);
// a from registers, as mma.cuh has it.
template <bool bf16, bool b_transposed = false, int kRegisters>
__device__ void product(float (&c)[kRegisters], const uint32_t (&a)[4], const Operand& b,
                        bool accumulate = true);
__device__ void begin();
__device__ void commit();  // ends a group of products
template <int kLater>
__device__ void wait();  // until at most kLater groups are under way
// Tells the compiler that c may change where it stands.
template <int kRegisters>
__device__ void hold(float (&c)[kRegisters]);

// Registers of each lane of the warpgroup, a multiple of 8; one branch for each role.
template <int kRegisters>
__device__ void fewer_registers();
template <int kRegisters>
__device__ void more_registers();

}  // namespace pentad::hopper

#if defined(__CUDACC__)
#include "common/hopper_device.cuh"
#else
#include "common/cuda_host/hopper_host.h"
#endif
