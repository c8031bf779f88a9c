// SPDX-License-Identifier: Apache-2.0
// Sums of the rows that share a key, in one order and without atomics on floats: the scatter-add of
// every gradient here. Keys are sorted (stable, so that items of a key keep their order); then chunks
// of the sorted items are summed side by side, and sums that cross chunks are put together.
//
// The order of additions depends on the number of items of each key and nothing else.
#pragma once
#include "pq/pq_device.cuh"

namespace pentad::pq::cuda {

constexpr int64_t kMostItems = int64_t{0xffffffff};
constexpr int kChunk = 128;  // sorted items that a lane adds up

// (count) of each, sorted by key. Keys of `rows` and above belong to no row; they come last.
struct Groups {
  const uint32_t *keys, *items;
  int64_t count;
  uint32_t rows;
};

// Arrays for the sort: keys and items are filled by the caller, in `keys` and `items`.
struct SortSpace {
  uint32_t *keys, *items, *other_keys, *other_items;
  uint32_t* counts;  // (256, blocks)
  uint32_t* totals;  // (256)

  SortSpace(Pieces& pieces, int64_t count);
};

// Throws std::invalid_argument where the sizes are beyond 32 bits.
void check_groups(int64_t count, int64_t rows);
// By rising key, items of equal keys in the order in which they came.
Groups sort_groups(const CudaStream& stream, const SortSpace& space, int64_t count, int64_t rows);
void fill_zeros(const CudaStream& stream, float* out, int64_t count);

inline float* take_partial_sums(Pieces& pieces, int64_t count, int64_t width) {
  return pieces.take<float>(ceil_div(count, kChunk) * 2 * width);
}

struct SumShape {
  int64_t width, column_tiles;
  int columns;  // of a block: a power of two; the rest of its lanes take other chunks

  explicit SumShape(int64_t width) : width(width), columns(1) {
    while (columns < width && columns < kLanes) columns *= 2;
    column_tiles = ceil_div(width, columns);
  }
};

// keys, items (count), source(item, column) -> sink(key, column, sum); sums of groups that begin or
// end in other chunks go to partial (chunks, 2, width): first what continues a group, then what
// begins one.
// Limit: memory, the source's rows.
template <class Source, class Sink>
__global__ void __launch_bounds__(kLanes)
    sum_chunks(Groups groups, SumShape shape, Source source, Sink sink, float* partial) {
  const int64_t tile = quotient(blockIdx.x, shape.column_tiles);
  const int64_t column = (blockIdx.x - tile * shape.column_tiles) * shape.columns +
                         static_cast<int>(threadIdx.x) % shape.columns;
  const int64_t chunk =
      tile * (kLanes / shape.columns) + static_cast<int>(threadIdx.x) / shape.columns;
  const int64_t first = chunk * kChunk, last = min(groups.count, first + kChunk);
  if (column >= shape.width || first >= last) return;
  uint32_t key = groups.keys[first];
  bool begins = first == 0 || groups.keys[first - 1] != key;
  float sum = 0;
  const auto finish = [&](bool ends) {
    if (key >= groups.rows) return;
    if (begins && ends) sink(key, column, sum);
    else partial[(chunk * 2 + (begins ? 1 : 0)) * shape.width + column] = sum;
  };
#pragma unroll 2
  for (int64_t i = first; i < last; ++i) {
    const uint32_t next = groups.keys[i];
    if (next != key) {
      finish(true);
      key = next;
      begins = true;
      sum = 0;
    }
    if (key < groups.rows) sum = __fadd_rn(sum, source(groups.items[i], column));
  }
  finish(last == groups.count || groups.keys[last] != key);
}

// Groups over several chunks, each by the chunk where it begins.
// Limit: latency, the longest group; memory otherwise.
template <class Sink>
__global__ void __launch_bounds__(kLanes)
    sum_partial(Groups groups, SumShape shape, const float* partial, Sink sink) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  int64_t chunk = quotient(at, shape.width);
  const int64_t column = at - chunk * shape.width;
  const int64_t first = chunk * kChunk;
  int64_t last = first + kChunk;
  if (last >= groups.count) return;  // nothing goes on
  const uint32_t key = groups.keys[last - 1];
  if (key >= groups.rows || groups.keys[last] != key) return;
  if (groups.keys[first] == key && first > 0 && groups.keys[first - 1] == key) return;
  float sum = partial[(chunk * 2 + 1) * shape.width + column];
  for (; last < groups.count && groups.keys[last] == key; last += kChunk)
    sum = __fadd_rn(sum, partial[++chunk * 2 * shape.width + column]);
  sink(key, column, sum);
}

// Writes every key that has items; the others are the caller's.
template <class Source, class Sink>
void grouped_sum(const CudaStream& stream, const char* name, const Groups& groups, int64_t width,
                 const Source& source, const Sink& sink, float* partial) {
  if (groups.count == 0 || width == 0) return;
  const SumShape shape(width);
  const int64_t chunks = ceil_div(groups.count, kChunk);
  launch(stream, name, sum_chunks<Source, Sink>,
         Grid{blocks_of(ceil_div(chunks, kLanes / shape.columns) * shape.column_tiles), kLanes},
         groups, shape, source, sink, partial);
  if (chunks > 1)
    launch(stream, name, sum_partial<Sink>,
           Grid{blocks_of(ceil_div(chunks * width, kLanes)), kLanes}, groups, shape, partial, sink);
}

}  // namespace pentad::pq::cuda
