// SPDX-License-Identifier: Apache-2.0
// The k largest of each row: a block finds the k-th largest key by its bytes, from the highest, and
// then goes through the row once more, in order, and writes what is kept.
#include "common/cuda_launch.cuh"
#include "sparse/score_cuda.h"

namespace pentad::sparse::cuda {
namespace {

constexpr int kLanes = 512, kWarps = kLanes / 32;
constexpr int kDigits = 256;

// What a kernel writes, each of it where it is not null.
template <class Bits>
struct Kept {
  int32_t* narrow_indices;
  int64_t* wide_indices;
  Bits* values;
  Bits* sparse;  // (n, d)
};

template <class Bits>
struct SelectTask {
  const Bits* x;
  int64_t columns, row_stride, column_stride, k;
  uint32_t infinity;  // its bits
  bool absolute;
  Kept<Bits> kept;

  // Keys are in the order of the numbers: of 2^31 and above those that are not negative, NaN the
  // largest, both zeros equal. In 16 bits alike, around 2^15.
  __device__ uint32_t key(Bits bits) const {
    constexpr uint32_t kMiddle = uint32_t{1} << (8 * sizeof(Bits) - 1);
    const uint32_t magnitude = bits & (kMiddle - 1);
    if (magnitude > infinity) return kMiddle + (kMiddle - 1);
    return bits & kMiddle && !absolute ? kMiddle - magnitude : kMiddle + magnitude;
  }
};

// x (n, d) -> the k largest of each row, a block for each. Limit: memory where d is large, of which a
// row is read once for each byte of a number and once more (the cache has rows up to some megabytes);
// a single row is read by a single block.
template <class Bits>
__global__ void __launch_bounds__(kLanes) select_rows(SelectTask<Bits> task) {
  const int tid = static_cast<int>(threadIdx.x), lane = lane_of_warp(), warp = tid / 32;
  const Bits* row = task.x + blockIdx.x * task.row_stride;
  Shared shared;
  int* counts = shared.take<int>(kDigits);
  auto* state =
      shared.take<int64_t>(2);  // of the k-th largest key: the bytes so far, its rank among
                                // the keys that begin with them
  int* above_in = shared.take<int>(kWarps);
  int* ties_in = shared.take<int>(kWarps);
  if (tid == 0) state[0] = 0, state[1] = task.k;
  for (int shift = 8 * sizeof(Bits) - 8; shift >= 0; shift -= 8) {
    for (int i = tid; i < kDigits; i += kLanes) counts[i] = 0;
    __syncthreads();
    const auto known = static_cast<uint64_t>(state[0]);
    for (int64_t c = tid; c < task.columns; c += kLanes) {
      const uint32_t key = task.key(row[c * task.column_stride]);
      if (static_cast<uint64_t>(key) >> (shift + 8) == known)
        atomicAdd(&counts[key >> shift & 255], 1);
    }
    __syncthreads();
    if (warp == 0) {  // lane has 8 digits, the largest first
      const int64_t rank = state[1];
      int mine = 0;
      for (int i = 0; i < 8; ++i) mine += counts[kDigits - 1 - lane * 8 - i];
      int64_t before = 0, sum = mine;
      for (int by = 1; by < 32; by *= 2) {
        const int64_t other = __shfl_up_sync(kFullWarp, sum, by);
        if (lane >= by) sum += other;
      }
      before = sum - mine;
      __syncwarp();
      if (before < rank && rank <= sum)
        for (int i = 0; i < 8; ++i) {
          const int digit = kDigits - 1 - lane * 8 - i;
          if (before + counts[digit] >= rank) {
            state[0] = static_cast<int64_t>(known << 8 | static_cast<uint64_t>(digit));
            state[1] = rank - before;
            break;
          }
          before += counts[digit];
        }
    }
    __syncthreads();
  }

  const uint32_t least = task.k ? static_cast<uint32_t>(state[0]) : 0xffffffffu;
  const int64_t ties = state[1];  // that are kept of the keys equal to it
  int64_t above_before = 0, ties_before = 0;
  for (int64_t first = 0; first < task.columns; first += kLanes) {
    const int64_t c = first + tid;
    const Bits bits = c < task.columns ? row[c * task.column_stride] : Bits{0};
    const uint32_t key = task.key(bits);
    const bool above = c < task.columns && key > least, tie = c < task.columns && key == least;
    const uint32_t all_above = __ballot_sync(kFullWarp, above);
    const uint32_t all_ties = __ballot_sync(kFullWarp, tie);
    if (lane == 0) above_in[warp] = __popc(all_above), ties_in[warp] = __popc(all_ties);
    __syncthreads();
    const uint32_t below = (1u << lane) - 1;
    int64_t more = above_before + __popc(all_above & below);
    int64_t equal = ties_before + __popc(all_ties & below);
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) more += above_in[w], equal += ties_in[w];
      above_before += above_in[w], ties_before += ties_in[w];
    }
    __syncthreads();
    const bool kept = above || (tie && equal < ties);
    if (c < task.columns && task.kept.sparse)
      task.kept.sparse[blockIdx.x * task.columns + c] = kept ? bits : Bits{0};
    if (!kept) continue;
    const int64_t to = blockIdx.x * task.k + more + min(equal, ties);
    if (task.kept.narrow_indices) task.kept.narrow_indices[to] = static_cast<int32_t>(c);
    if (task.kept.wide_indices) task.kept.wide_indices[to] = c;
    if (task.kept.values) task.kept.values[to] = bits;
  }
}

template <class Bits>
void select(const CudaStream& stream, const FloatRows& x, int64_t k, bool absolute, void* indices,
            DType index_dtype, void* values, void* out) {
  const uint32_t infinity = x.dtype == DType::f32   ? 0x7f800000
                            : x.dtype == DType::f16 ? 0x7c00
                                                    : 0x7f80;
  const bool wide = index_dtype == DType::i64;
  const Kept<Bits> kept{wide ? nullptr : static_cast<int32_t*>(indices),
                        wide ? static_cast<int64_t*>(indices) : nullptr, static_cast<Bits*>(values),
                        static_cast<Bits*>(out)};
  const SelectTask<Bits> task{static_cast<const Bits*>(x.data),
                              x.columns,
                              x.row_stride,
                              x.column_stride,
                              k,
                              infinity,
                              absolute,
                              kept};
  launch(
      stream, "sparse: select_rows", select_rows<Bits>,
      Grid{blocks_of(x.rows), kLanes,
           shared_bytes<int>(kDigits) + shared_bytes<int64_t>(2) + 2 * shared_bytes<int>(kWarps)},
      task);
}

}  // namespace

void select_topk(const CudaStream& stream, const FloatRows& x, int64_t k, bool absolute,
                 void* indices, DType index_dtype, void* values, void* out) {
  if (x.rows == 0 || x.columns == 0) return;
  if (x.dtype == DType::f32)
    select<uint32_t>(stream, x, k, absolute, indices, index_dtype, values, out);
  else select<uint16_t>(stream, x, k, absolute, indices, index_dtype, values, out);
}

}  // namespace pentad::sparse::cuda
