// SPDX-License-Identifier: Apache-2.0
// Lookups. One lane makes one piece of an output row (16 bytes, where the tables' rows are whole
// pieces), so that neighbours read and write neighbouring pieces.
#include "pq/lookup_cuda.h"
#include "pq/lookup_tables.cuh"

namespace pentad::pq::cuda {
namespace {

constexpr int kPieces = 4;         // of a lane that copies
constexpr int kStoredTables = 64;  // at a time: a kernel's arguments are up to 4 KB

struct StoredTables {
  DeviceTable tables[kStoredTables];
};

// tables of the arguments -> list.
// Limit: latency.
__global__ void store_tables(StoredTables tables, int count, DeviceTable* list) {
  const int m = static_cast<int>(threadIdx.x);
  if (m < count) list[m] = tables.tables[m];
}

// codes (n, M) -> out (n, M, pieces): copies.
// Limit: memory, the bytes of out; the tables come from the caches.
template <class Piece>
__global__ void __launch_bounds__(kLanes)
    gather(LookupTask task, int64_t pieces, int64_t count, Piece* out) {
  const int64_t first = int64_t{blockIdx.x} * (kLanes * kPieces) + static_cast<int>(threadIdx.x);
  Piece got[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int64_t i = first + j * kLanes;
    if (i >= count) break;
    const int64_t place = quotient(i, pieces), row = quotient(place, task.codes.columns);
    const int64_t m = place - row * task.codes.columns;
    const DeviceTable table = task.tables[m];
    const int64_t code = code_below(task.codes, row, m, table.rows);
    if (code >= 0)
      got[j] = reinterpret_cast<const Piece*>(table.base + code * table.step)[i - place * pieces];
    else memset(&got[j], 0xff, sizeof(Piece));  // a NaN in every dtype
  }
#pragma unroll
  for (int j = 0; j < kPieces; ++j)
    if (first + j * kLanes < count) out[first + j * kLanes] = got[j];
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  T x[kCount];
};

// codes (n, M), weights (n, M) -> out (outputs, M * width or width), bags or rows for themselves.
// Limit: memory, the tables' rows that are read where they are too large for the caches.
template <class T, int kCount>
__global__ void __launch_bounds__(kLanes)
    combine(LookupTask task, int64_t pieces, int64_t count, Piece<T, kCount>* out) {
  const int64_t at = int64_t{blockIdx.x} * kLanes + static_cast<int>(threadIdx.x);
  if (at >= count) return;
  const int64_t columns = task.codes.columns;
  const int64_t b = quotient(at, pieces), piece = at - b * pieces;
  const bool concat = task.combine == Combine::concat;
  const bool product = task.combine == Combine::product;
  const int64_t table_pieces = task.width / kCount;
  const int64_t m_first = concat ? quotient(piece, table_pieces) : 0;
  const int64_t m_last = concat ? m_first + 1 : columns;
  const int64_t within = piece - m_first * table_pieces;
  const int64_t first = task.first(b), last = task.last(b);
  float sums[kCount] = {};
  for (int64_t i = first; i < last; ++i) {
    float factors[kCount];
#pragma unroll
    for (int d = 0; d < kCount; ++d) factors[d] = 1;
#pragma unroll 2
    for (int64_t m = m_first; m < m_last; ++m) {
      const DeviceTable table = task.tables[m];
      const int64_t code = code_below(task.codes, i, m, table.rows);
      const float weight = code < 0 ? not_a_number() : task.weight(i, m);
      Piece<T, kCount> entry;
      if (code >= 0)
        entry = reinterpret_cast<const Piece<T, kCount>*>(table.base + code * table.step)[within];
#pragma unroll
      for (int d = 0; d < kCount; ++d) {
        const float term = code < 0 ? weight : __fmul_rn(weight, widened(entry.x[d]));
        if (product) factors[d] = __fmul_rn(factors[d], term);
        else sums[d] = __fadd_rn(sums[d], term);
      }
    }
    if (product)
#pragma unroll
      for (int d = 0; d < kCount; ++d) sums[d] = __fadd_rn(sums[d], factors[d]);
  }
  Piece<T, kCount> result;
#pragma unroll
  for (int d = 0; d < kCount; ++d) {
    if (task.combine == Combine::mean && first < last)
      sums[d] = __fdiv_rn(sums[d], static_cast<float>((last - first) * columns));
    narrow(sums[d], result.x[d]);
  }
  out[at] = result;
}

template <class Piece>
void launch_gather(const CudaStream& stream, const LookupTask& task, int64_t row_bytes, void* out) {
  const int64_t pieces = row_bytes / static_cast<int64_t>(sizeof(Piece));
  const int64_t count = task.codes.rows * task.codes.columns * pieces;
  launch(stream, "pq: gather", gather<Piece>,
         Grid{blocks_of(ceil_div(count, kLanes * kPieces)), kLanes}, task, pieces, count,
         static_cast<Piece*>(out));
}

template <class T, int kCount>
void launch_combine(const CudaStream& stream, const LookupTask& task, int64_t outputs,
                    int64_t out_width, void* out) {
  const int64_t pieces = out_width / kCount, count = outputs * pieces;
  launch(stream, "pq: combine", combine<T, kCount>,
         Grid{blocks_of(ceil_div(count, kLanes)), kLanes}, task, pieces, count,
         static_cast<Piece<T, kCount>*>(out));
}

}  // namespace

LookupTask task_of(const CudaStream& stream, const Lookup& p, const Codes* offsets,
                   DeviceTable* list) {
  const auto count = static_cast<int64_t>(p.tables.size());
  const Table& one = p.tables[0];
  const int64_t apart = count > 1 ? p.tables[1].base - one.base : 0;
  bool alike = true;
  for (int64_t m = 0; m < count; ++m) {
    const Table& table = p.tables[m];
    alike &= table.rows == one.rows && table.step == one.step && table.base == one.base + m * apart;
  }
  LookupTask task{};
  task.codes = p.codes;
  task.tables = {{one.base, one.rows, one.step, 0}, apart, alike ? nullptr : list};
  task.width = p.width;
  task.weights = p.weights, task.weights_dtype = p.weights_dtype;
  task.weight_row_stride = p.weight_row_stride, task.weight_stride = p.weight_stride;
  task.bags = offsets != nullptr;
  if (offsets) task.offsets = *offsets;
  task.combine = p.combine;
  int64_t rows = 0;
  for (int64_t m = 0; m < count && !alike; m += kStoredTables) {
    StoredTables stored{};
    const int some = static_cast<int>(min(int64_t{kStoredTables}, count - m));
    for (int j = 0; j < some; ++j) {
      const Table& table = p.tables[m + j];
      stored.tables[j] = {table.base, table.rows, table.step, rows};
      rows += table.rows;
    }
    launch(stream, "pq: store_tables", store_tables, Grid{1, kStoredTables}, stored, some,
           list + m);
  }
  return task;
}

bool has_whole_pieces(const Lookup& p) {
  bool whole = p.width * size_of(p.dtype) % 16 == 0;
  for (const Table& table : p.tables)
    whole &= reinterpret_cast<uintptr_t>(table.base) % 16 == 0 && table.step % 16 == 0;
  return whole;
}

int64_t lookup_scratch(int64_t subspaces) {
  return subspaces * static_cast<int64_t>(sizeof(DeviceTable));
}

void lookup(const CudaStream& stream, const Lookup& p, const Codes* offsets, void* out,
            void* scratch) {
  const int64_t outputs = offsets ? offsets->rows : p.codes.rows;
  const int64_t out_width = p.out_width(), row_bytes = p.width * size_of(p.dtype);
  if (outputs == 0 || out_width == 0) return;
  const LookupTask task = task_of(stream, p, offsets, static_cast<DeviceTable*>(scratch));
  const bool whole = has_whole_pieces(p) && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  if (p.combine == Combine::concat && !p.weights && !offsets) {
    if (whole) launch_gather<uint4>(stream, task, row_bytes, out);
    else if (p.dtype == DType::f32) launch_gather<uint32_t>(stream, task, row_bytes, out);
    else launch_gather<uint16_t>(stream, task, row_bytes, out);
    return;
  }
  const auto run = [&]<class T>(T) {
    constexpr int kCount = 16 / sizeof(T);
    if (whole) launch_combine<T, kCount>(stream, task, outputs, out_width, out);
    else launch_combine<T, 1>(stream, task, outputs, out_width, out);
  };
  if (p.dtype == DType::f16) run(__half{});
  else if (p.dtype == DType::bf16) run(__nv_bfloat16{});
  else run(0.0f);
}

}  // namespace pentad::pq::cuda
