// SPDX-License-Identifier: Apache-2.0
// What the passes of the selective scan share. A block takes 64 channels of one group, a lane for
// each with its states in registers, and goes through time in chunks of 32 steps:
//
//   tiles     u, delta, z, ... of a chunk, copied as they lie in memory, along time or along channels,
//             16 bytes at a time where addresses allow; a lane reads runs of four steps of its channel
//   B, C      of a chunk as floats [t][n], which all lanes read at once
//   states    as many as registers hold (S); where there are more, a chunk is gone through several
//             times, and what lies between rests in scratch memory
//
// With few channels time is cut into spans that run side by side (selective_scan_spans.cuh).
#pragma once
#include <algorithm>

#include "common/cp_async.cuh"
#include "scan/scan_elements.cuh"

namespace pentad::scan::cuda {

constexpr int kScanLanes = 64;
constexpr int kChunkSteps = static_cast<int>(kChunk);
constexpr int kRunSteps = 4;

// --- The problem --------------------------------------------------------------------------------------

// How an array (b, d, t) is copied into tiles.
struct TileOf {
  Operand x;
  bool by_channel;  // channels next to each other in the tile, else steps
  bool pieces;      // copied 16 bytes at a time
};

struct Scan {
  int64_t batch, dim, length, states, groups, per_group, sequences;
  int64_t blocks_per_group;  // of 64 channels
  int64_t chunks_per_span, spans;
  bool complex, softplus, reverse, constant_b, constant_c;
  TileOf u, delta, z;
  Operand a, b, c, d, delta_bias, initial;
  Indices begin;

  __host__ __device__ int64_t parts() const { return complex ? 2 : 1; }
  __host__ __device__ int64_t width() const { return states * parts(); }
};

// Where step i of a sequence in scan order lies, and its chunks among the stored ones.
struct ScanSequence {
  Sequence at;
  bool reverse;
  int64_t stored;
  __device__ ScanSequence(const Scan& p, int64_t s)
      : at(sequence_of(p.begin, s, p.length)),
        reverse(p.reverse),
        stored(p.begin.data ? at.first / kChunk + s : s * ((p.length + kChunk - 1) / kChunk)) {}
  __device__ int64_t time(int64_t i) const { return at.first + (reverse ? at.steps - 1 - i : i); }
};

// Which channels and span a block has.
struct ScanBlock {
  int64_t group, channel, span, item;  // item: sequence, or piece of the batch
  int channels;
  __device__ explicit ScanBlock(const Scan& p) {
    int64_t index = blockIdx.x;
    const int64_t first = index % p.blocks_per_group * kScanLanes;
    group = (index /= p.blocks_per_group) % p.groups;
    span = (index /= p.groups) % p.spans;
    item = index / p.spans;
    channel = group * p.per_group + first;
    channels = static_cast<int>(min(int64_t{kScanLanes}, p.per_group - first));
  }
};
inline int64_t scan_blocks(const Scan& p, int64_t items) {
  return items * p.spans * p.groups * p.blocks_per_group;
}

// --- Tiles --------------------------------------------------------------------------------------------

// (64 channels, 32 steps): rows of channels, padded so that lanes which read four steps each meet
// different banks, or rows of steps. A reversed chunk lies as in memory, its first step last.
template <class T>
struct Tile {
  static constexpr int kPitch = kChunkSteps + 16 / static_cast<int>(sizeof(T));
  static constexpr int kSize = kScanLanes * kPitch;
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  T* data;
  bool by_channel, reverse;

  __device__ T& at(int channel, int column) const {
    return data[by_channel ? column * kScanLanes + channel : channel * kPitch + column];
  }
  __device__ int column(int step) const { return reverse ? kChunkSteps - 1 - step : step; }
  // Steps [4 run, 4 run + 4) of a channel.
  __device__ void get(int channel, int run, float (&x)[kRunSteps]) const {
    const int first = reverse ? kChunkSteps - kRunSteps * (run + 1) : kRunSteps * run;
    float v[kRunSteps];
    if (by_channel) {
#pragma unroll
      for (int j = 0; j < kRunSteps; ++j) v[j] = to_float(at(channel, first + j));
    } else {
      read_four(&at(channel, first), v);
    }
#pragma unroll
    for (int j = 0; j < kRunSteps; ++j) x[j] = reverse ? v[kRunSteps - 1 - j] : v[j];
  }
  __device__ void put(int channel, int run, const float (&x)[kRunSteps]) const {
    const int first = reverse ? kChunkSteps - kRunSteps * (run + 1) : kRunSteps * run;
    float v[kRunSteps];
#pragma unroll
    for (int j = 0; j < kRunSteps; ++j) v[j] = reverse ? x[kRunSteps - 1 - j] : x[j];
    if (by_channel) {
#pragma unroll
      for (int j = 0; j < kRunSteps; ++j) from_float(v[j], at(channel, first + j));
    } else {
      write_four(&at(channel, first), v);
    }
  }
};

// The part of an array that a tile is of: `steps` steps from step i of the sequence on. f(channel,
// column, count, offset in the array) for runs of `count` elements next to each other in both.
template <class T, class F>
__device__ void for_tile(const TileOf& x, bool by_channel, bool pieces, const ScanSequence& s,
                         const ScanBlock& block, int64_t i, int steps, const F& f) {
  const int64_t* stride = x.x.stride;
  const int64_t first = s.reverse ? s.time(i) - (kChunkSteps - 1) : s.time(i);  // of column 0
  const int64_t base = s.at.b * stride[0] + block.channel * stride[1] + first * stride[2];
  // Columns that hold steps.
  const int low = s.reverse ? kChunkSteps - steps : 0, high = low + steps;
  const int piece = pieces ? Tile<T>::kPiece : 1;
  const int across = (by_channel ? kScanLanes : kChunkSteps) / piece;
  const int all = kScanLanes * kChunkSteps / piece;
  for (int n = static_cast<int>(threadIdx.x); n < all; n += kScanLanes) {
    const int fast = n % across * piece, slow = n / across;
    const int channel = by_channel ? fast : slow, column = by_channel ? slow : fast;
    const int last_channel = by_channel ? channel + piece - 1 : channel;
    const int last_column = by_channel ? column : column + piece - 1;
    const int64_t at = base + channel * stride[1] + column * stride[2];
    if (channel >= block.channels || column >= high || last_column < low) continue;
    if (last_channel < block.channels && column >= low && last_column < high) {
      f(channel, column, piece, at);
    } else {  // a piece of which only some exist
      for (int j = 0; j < piece; ++j) {
        const int c = by_channel ? channel + j : channel, t = by_channel ? column : column + j;
        if (c < block.channels && t >= low && t < high)
          f(c, t, 1, base + c * stride[1] + t * stride[2]);
      }
    }
  }
}

// Begins to copy; the caller commits and waits.
template <class T>
__device__ Tile<T> fill(T* memory, const TileOf& x, const ScanSequence& s, const ScanBlock& block,
                        int64_t i, int steps) {
  const Tile<T> tile{memory, x.by_channel, s.reverse};
  const T* from = static_cast<const T*>(x.x.data);
  for_tile<T>(x, x.by_channel, x.pieces, s, block, i, steps,
              [&](int channel, int column, int count, int64_t at) {
                if (count > 1) cp_async(&tile.at(channel, column), from + at);
                else tile.at(channel, column) = from[at];
              });
  return tile;
}
template <class T>
__device__ void store(const Tile<T>& tile, const TileOf& x, const ScanSequence& s,
                      const ScanBlock& block, int64_t i, int steps) {
  T* to = static_cast<T*>(x.x.data);
  const bool pieces = x.pieces && x.by_channel == tile.by_channel;
  for_tile<T>(x, x.by_channel, pieces, s, block, i, steps,
              [&](int channel, int column, int count, int64_t at) {
                if (count > 1)
                  *reinterpret_cast<uint4*>(to + at) =
                      *reinterpret_cast<const uint4*>(&tile.at(channel, column));
                else to[at] = tile.at(channel, column);
              });
}

// --- B and C -----------------------------------------------------------------------------------------

// S states of a chunk as floats: [t][n][part], or where they are constant [n][part][lane].
template <class N, int S>
struct Coefficients {
  static constexpr int kWidth = S * N::kParts;
  static constexpr int kPitch = kWidth + 4;  // writers along time meet 8 banks and not 2
  static constexpr int kSize =
      kChunkSteps * kPitch > kWidth* kScanLanes ? kChunkSteps * kPitch : kWidth * kScanLanes;
  float* data;
  bool constant;

  // n a multiple of four, or of two complex ones.
  __device__ void get(int step, int n, N (&x)[4 / N::kParts]) const {
    float v[4];
    const int k = n * N::kParts;
    if (constant) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = data[(k + j) * kScanLanes + threadIdx.x];
    } else {
      const float4 four = *reinterpret_cast<const float4*>(data + step * kPitch + k);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < 4 / N::kParts; ++j)
      x[j] = number(v[j * N::kParts], v[j * N::kParts + N::kParts - 1], N{});
  }
};

// States [n0, n0 + S) of a chunk, times `factor`; zeros past the last.
template <class T, class N, int S>
__device__ void fill(const Coefficients<N, S>& to, const Scan& p, const Operand& x,
                     const ScanSequence& s, const ScanBlock& block, int64_t i, int steps,
                     int64_t n0, float factor) {
  constexpr int kWidth = Coefficients<N, S>::kWidth;
  const int64_t* stride = x.stride;
  if (to.constant) {
    const int lane = static_cast<int>(threadIdx.x);
    for (int k = 0; k < kWidth; ++k) {
      const int64_t n = n0 + k / N::kParts;
      const bool there = n < p.states && lane < block.channels;
      to.data[k * kScanLanes + lane] =
          there ? factor *
                      static_cast<const float*>(x.data)[(block.channel + lane) * stride[0] +
                                                        n * stride[1] + k % N::kParts * stride[2]]
                : 0.0f;
    }
    return;
  }
  const T* from = static_cast<const T*>(x.data) + s.at.b * stride[0] + block.group * stride[1];
  const bool along_time = stride[3] == N::kParts || stride[3] == 1;
  for (int m = static_cast<int>(threadIdx.x); m < kWidth * kChunkSteps; m += kScanLanes) {
    const int k = along_time ? m / kChunkSteps : m % kWidth;
    const int step = along_time ? m % kChunkSteps : m / kWidth;
    const int64_t n = n0 + k / N::kParts;
    float value = 0.0f;
    if (n < p.states && step < steps)
      value =
          factor *
          to_float(from[n * stride[2] + s.time(i + step) * stride[3] + k % N::kParts * stride[4]]);
    to.data[step * Coefficients<N, S>::kPitch + k] = value;
  }
}

// --- States of a lane's channel ------------------------------------------------------------------------

// (d, n, part) floats from x + offset on; zeros where it is absent. A comes in units of log2.
template <class N, int S>
__device__ void get_states(const Operand& x, int64_t offset, int axis, const Scan& p,
                           int64_t channel, int64_t n0, bool live, N (&h)[S]) {
  const int64_t* stride = x.stride + axis;
#pragma unroll
  for (int n = 0; n < S; ++n) {
    h[n] = N{};
    if (live && x.data && n0 + n < p.states)
      h[n] = read_number<N>(x.data, DType::f32, offset + channel * stride[0] + (n0 + n) * stride[1],
                            stride[2]);
  }
}
template <class N, int S>
__device__ void put_states(const Operand& x, int64_t offset, int axis, const Scan& p,
                           int64_t channel, int64_t n0, bool live, const N (&h)[S]) {
  const int64_t* stride = x.stride + axis;
#pragma unroll
  for (int n = 0; n < S; ++n)
    if (live && n0 + n < p.states)
      write_number(x.data, DType::f32, offset + channel * stride[0] + (n0 + n) * stride[1],
                   stride[2], h[n]);
}
// Of scratch memory, [n][part][d].
inline __device__ Operand states_at(float* data, const Scan& p) {
  return {data, DType::f32, {1, p.parts() * p.dim, p.dim}};
}

__device__ inline Real in_log2(Real a) { return {a.re * kLog2e}; }
__device__ inline Complex in_log2(Complex a) { return {a.re * kLog2e, a.im}; }

// dt and dt u of a run; past the last step 0, which changes no state.
struct RunInputs {
  float dt[kRunSteps], u[kRunSteps];
  template <class T>
  __device__ RunInputs(const Scan& p, const Tile<T>& delta, const Tile<T>& inputs, int lane,
                       int run, int steps, float bias) {
    delta.get(lane, run, dt);
    inputs.get(lane, run, u);
#pragma unroll
    for (int j = 0; j < kRunSteps; ++j) {
      const bool there = run * kRunSteps + j < steps;
      const float x = dt[j] + bias;
      dt[j] = there ? (p.softplus ? softplus(x) : x) : 0.0f;
      u[j] = there ? u[j] : 0.0f;
    }
  }
};

// --- On the host ------------------------------------------------------------------------------------

// f(T{}, N{}, the number of states in registers).
template <class F>
void for_scan(DType dtype, const Scan& p, const F& f) {
  for_type(dtype, [&](auto type) {
    if (p.complex) f(type, Complex{}, std::integral_constant<int, 8>{});
    else if (p.states <= 4) f(type, Real{}, std::integral_constant<int, 4>{});
    else f(type, Real{}, std::integral_constant<int, 16>{});
  });
}
inline int64_t states_in_registers(bool complex, int64_t states) {
  return complex ? 8 : states <= 4 ? 4 : 16;
}

// How often time is cut: where there are too few channels to fill a device, though every cut costs
// the computation of its last state. By shapes alone, so that results do not depend on the device.
struct Spans {
  int64_t chunks_per_span, spans;
  Spans(int64_t batch, int64_t dim, int64_t length, bool packed, int64_t asked) {
    constexpr int64_t kEnoughLanes = 8192, kFull = 32768, kLeastChunks = 8;
    const int64_t chunks = std::max<int64_t>(1, ceil_div(length, kChunk));
    const int64_t lanes = std::max<int64_t>(1, batch * dim);
    int64_t wanted = 1;
    if (asked) wanted = std::min(asked, chunks);
    else if (lanes < kEnoughLanes)
      wanted = std::max<int64_t>(1, std::min(ceil_div(kFull, lanes), chunks / kLeastChunks));
    if (packed) wanted = 1;
    chunks_per_span = ceil_div(chunks, wanted);
    spans = ceil_div(chunks, chunks_per_span);
  }
};

inline TileOf tile_of(const Operand& x, const SelectiveScan& p, bool packed) {
  if (!x.data) return {x, false, false};
  const int64_t piece = 16 / size_of(x.dtype);
  const auto whole = [&](int64_t n) { return n % piece == 0; };
  const bool base = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && whole(x.stride[0]);
  if (x.stride[1] == 1 && x.stride[2] != 1)
    return {x, true, base && whole(x.stride[2]) && whole(p.dim / p.groups)};
  const bool steps = !packed && (!p.reverse || whole(p.length));
  return {x, false, base && x.stride[2] == 1 && whole(x.stride[1]) && steps};
}

inline Scan scan_of(const SelectiveScan& p, const Indices& begin, int64_t asked_spans) {
  const bool packed = begin.data;
  const Spans spans(p.batch, p.dim, p.length, packed, asked_spans);
  const int64_t per_group = p.dim / p.groups;
  return {p.batch,
          p.dim,
          p.length,
          p.states,
          p.groups,
          per_group,
          sequences_of(begin, p.batch),
          ceil_div(per_group, kScanLanes),
          spans.chunks_per_span,
          spans.spans,
          p.complex,
          p.softplus,
          p.reverse,
          p.constant_b,
          p.constant_c,
          tile_of(p.u, p, packed),
          tile_of(p.delta, p, packed),
          tile_of(p.z, p, packed),
          p.a,
          p.b,
          p.c,
          p.d,
          p.delta_bias,
          p.initial,
          begin};
}

// Cuts scratch memory into arrays.
class ScratchCuts {
 public:
  explicit ScratchCuts(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + bytes) : nullptr;
    bytes += (count * int64_t{sizeof(T)} + 15) / 16 * 16;
    return array;
  }
  int64_t bytes = 0;

 private:
  char* memory_;
};

}  // namespace pentad::scan::cuda
