// SPDX-License-Identifier: Apache-2.0
// New keys and values into the caches.
#include "attention/attention_cache.cuh"

namespace pentad::attention::cuda {
namespace {

constexpr int kLanes = 256;
constexpr int kRows = kLanes / 32;  // of a block: one per warp

struct Copy {
  Operand from, to;
  int dim;
  bool pieces;  // of 16 bytes, all aligned
};

struct AppendTask {
  Caches caches;
  int64_t batch, kv_heads, new_tokens;
  Copy copies[2];
};

// k_new, v_new (batch, kv_heads, new_tokens, dim) -> caches, a warp for a row of each.
// Limit: latency; a decoding step copies one token per sequence and head.
template <class Element>
__global__ void __launch_bounds__(kLanes) append_kernel(AppendTask task) {
  const int64_t rows = task.batch * task.kv_heads * task.new_tokens;
  const int64_t n = int64_t{blockIdx.x} * kRows + threadIdx.x / 32;
  if (n >= rows) return;
  const int64_t t = n % task.new_tokens, pair = n / task.new_tokens;
  const int64_t h = pair % task.kv_heads, b = pair / task.kv_heads;
  const CachedKeys sequence(task.caches, b, task.new_tokens);
  if (!sequence.valid) return;
  const CachePlace place = sequence.place(task.caches, b, sequence.length + static_cast<int>(t));
  if (!place.exists) return;
  for (const Copy& copy : task.copies) {
    const int64_t *in = copy.from.stride, *out = copy.to.stride;
    const auto* from =
        static_cast<const Element*>(copy.from.data) + b * in[0] + h * in[1] + t * in[2];
    auto* to = static_cast<Element*>(copy.to.data) + place.outer * out[0] + h * out[1] +
               place.inner * out[2];
    if (copy.pieces) {
      constexpr int kPiece = 16 / sizeof(Element);
      for (int d = lane_of_warp() * kPiece; d < copy.dim; d += 32 * kPiece)
        *reinterpret_cast<uint4*>(to + d) = *reinterpret_cast<const uint4*>(from + d);
    } else {
      for (int d = lane_of_warp(); d < copy.dim; d += 32) to[d * out[3]] = from[d * in[3]];
    }
  }
}

Copy copy_of(const Operand& from, const Operand& to, int64_t dim) {
  const bool pieces = dim * size_of(to.dtype) % 16 == 0 && has_pieces(from) && has_pieces(to);
  return {from, to, static_cast<int>(dim), pieces};
}

}  // namespace

void append(const CudaStream& stream, const Problem& p, const Caches& caches, const Operand& k_new,
            const Operand& v_new, int64_t new_tokens) {
  const int64_t rows = p.batch * p.kv_heads * new_tokens;
  if (rows == 0) return;
  position_of(caches.capacity, "positions of a cache");
  const AppendTask task{caches,
                        p.batch,
                        p.kv_heads,
                        new_tokens,
                        {copy_of(k_new, p.k, p.dim), copy_of(v_new, p.v, p.value_dim)}};
  const Grid grid{blocks_of(ceil_div(rows, kRows)), kLanes};
  const auto kernel = size_of(p.k.dtype) == 4 ? append_kernel<uint32_t> : append_kernel<uint16_t>;
  launch(stream, "attention: append", kernel, grid, task);
}

}  // namespace pentad::attention::cuda
