// SPDX-License-Identifier: Apache-2.0
// Gradients by tiles, with the probabilities computed anew from lse. Two passes of one kernel: blocks
// own queries and walk over the keys for dq; blocks own keys and walk over the queries for dk and dv.
// So each sum has one owner and one order, at 7 products a pair of tiles where a pass with atomics
// for dq has 5.
#include "attention/attention_hopper.h"
#include "attention/attention_gradient.cuh"

namespace pentad::attention::cuda {

namespace {

// What a block of the pass writes: of dimensions [chunk kOut, + kOut).
template <bool kByKeys, int kDim>
constexpr int kOut = kDim < (kByKeys ? 128 : 256) ? kDim : (kByKeys ? 128 : 256);

struct Pass {
  Backward in;
  Array d_first, d_second;  // dq and nothing, or dk and dv; data may be null
  float* dkey_bias;
  int key_bias_heads;
  int tiles, chunks;
};

// A warp's sums of its own rows, through those rows of a tile.
template <int kRows, int kColumns, int kM, class T>
__device__ void write_sums(const float (&sums)[kM][kColumns / 8][4], float factor, T* tile,
                           int pitch, const Rows<T>& to, int first, int rows, int column,
                           int columns) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        tile[(m * 16 + r / 2 * 8 + lane / 4) * pitch + n * 8 + lane % 4 * 2 + r % 2] =
            from_float<T>(sums[m][n][r] * factor);
  __syncwarp();
  store_rows<kRows, kColumns>(tile, pitch, to, first, rows, column, columns);
}

// q, d_out (b, h, i, ..), k, v (b, h / group, j, ..) -> dq; or dk, dv and dkey_bias (b, h, j).
// Limit: tensor cores; 6 or 8 Sq Sk dim operations per head, and one exp2 per score.
template <class T, int kDim, bool kByKeys>
__global__ void __launch_bounds__(GradientShape<T, kDim>::kLanes) gradient_kernel(Pass pass) {
  using S = GradientShape<T, kDim>;
  constexpr int kM = S::kM, kN = S::kOther / 8, kWidth = kOut<kByKeys, kDim>;
  constexpr int kSecond = kByKeys ? kWidth : 8;
  const Backward& in = pass.in;
  const auto block = static_cast<int>(blockIdx.x % pass.tiles);
  const int chunk = static_cast<int>(blockIdx.x / pass.tiles % pass.chunks);
  const int own_head = static_cast<int>(blockIdx.x / pass.tiles / pass.chunks);
  // The longest rows, or columns, of a causal mask come first.
  const TilePlace place =
      in.sequences.tile(kByKeys, S::kOwn, kByKeys ? block : pass.tiles - 1 - block);
  const Sequence sequence = in.sequences[place.b];
  const int own_len = kByKeys ? sequence.k_len : sequence.q_len;
  if (place.first >= own_len) return;
  const int kv_head = kByKeys ? own_head : own_head / in.rules.group, column = chunk * kWidth;
  const auto k = in.k.rows<T>(place.b, kv_head, sequence.k_begin);
  const auto v = in.v.rows<T>(place.b, kv_head, sequence.k_begin);

  Shared shared;
  T* own_scores = shared.take<T>(S::kOwnTile);
  T* own_values = shared.take<T>(S::kOwnTile);
  T *other_scores[S::kStages], *other_values[S::kStages];
  for (int i = 0; i < S::kStages; ++i) {
    other_scores[i] = shared.take<T>(S::kOtherTile);
    other_values[i] = shared.take<T>(S::kOtherTile);
  }
  const bool special = in.special();
  float* spare = special ? shared.take<float>(2 * S::kSpare) : nullptr;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = lane_of_warp();
  const int own = place.first + warp * kM * 16;
  T* const a = own_scores + warp * kM * 16 * S::kPitch;
  T* const b = own_values + warp * kM * 16 * S::kPitch;

  float first_sums[kM][kWidth / 8][4], second_sums[kM][kSecond / 8][4], bias_sums[2 * kM] = {};
  clear(first_sums);
  clear(second_sums);
  if (kByKeys) {
    load_tile<S::kOwn, kDim, S::kLanes>(own_scores, k, place.first, own_len, 0, in.dim);
    load_tile<S::kOwn, kDim, S::kLanes>(own_values, v, place.first, own_len, 0, in.value_dim);
  }
  const int heads = kByKeys ? in.rules.group : 1;
  for (int member = 0; member < heads; ++member) {
    const int h = kByKeys ? own_head * in.rules.group + member : own_head;
    const HeadRules head(in.rules, place.b, h, sequence.q_len, sequence.k_len, sequence.k_begin);
    const HeadFacts facts(in.facts, in.sequences.row_at(sequence, place.b, h), in.d_key_mass,
                          in.sequences.key_at(sequence, place.b, h, in.rules.heads));
    const auto q = in.q.rows<T>(place.b, h, sequence.q_begin);
    const auto d_out = in.d_out.rows<T>(place.b, h, sequence.q_begin);
    if (!kByKeys) {
      load_tile<S::kOwn, kDim, S::kLanes>(own_scores, q, place.first, own_len, 0, in.dim);
      load_tile<S::kOwn, kDim, S::kLanes>(own_values, d_out, place.first, own_len, 0, in.value_dim);
    }
    const auto load_other = [&](int stage, int first) {
      const int rows = kByKeys ? sequence.q_len : sequence.k_len;
      load_tile<S::kOther, kDim, S::kLanes>(other_scores[stage], kByKeys ? q : k, first, rows, 0,
                                            in.dim);
      load_tile<S::kOther, kDim, S::kLanes>(other_values[stage], kByKeys ? d_out : v, first, rows,
                                            0, in.value_dim);
    };

    Walk<kByKeys, S::kOwn, S::kOther> walk(head, place.first);
    bool more = walk.next();
    if (more) load_other(0, walk.first);
    int stage = 0;
    while (more) {
      const int other = walk.first;
      const bool whole = walk.whole;
      cp_async_wait<0>();
      __syncthreads();
      more = walk.next();
      if (S::kStages == 2 && more) load_other(1 - stage, walk.first);
      const T *x = other_scores[stage], *y = other_values[stage];

      float c[kM][kN][4], d[kM][kN][4];
      clear(c);
      multiply_rows<kDim>(c, a, x, in.dim);
      clear(d);
      multiply_rows<kDim>(d, b, y, in.value_dim);
      const uint64_t seen = whole ? ~uint64_t{0} : seen_bits<kByKeys, kM, kN>(head, own, other);
      score_gradients<T, kByKeys, true>(head, facts, special, in.dropout, whole, seen, own, other,
                                        c, d, bias_sums, spare);
      if (!whole && not_finite<S::kOther, kDim, S::kLanes>(x))
        multiply_seen(first_sums, d, seen, x + column, S::kPitch);
      else multiply_weights(first_sums, d, x + column, S::kPitch);
      if constexpr (kByKeys) {
        if (!whole && not_finite<S::kOther, kDim, S::kLanes>(y))
          multiply_seen(second_sums, c, seen, y + column, S::kPitch);
        else multiply_weights(second_sums, c, y + column, S::kPitch);
      }
      if (S::kStages == 1) {
        __syncthreads();
        if (more) load_other(0, walk.first);
      } else {
        stage = 1 - stage;
      }
    }
    __syncthreads();  // nobody reads the tiles any more

    const bool by_head = pass.key_bias_heads == in.rules.heads;
    if (kByKeys && pass.dkey_bias && chunk == 0 && (by_head || member + 1 == heads)) {
      const int64_t at =
          in.sequences.key_at(sequence, place.b, by_head ? h : kv_head, pass.key_bias_heads);
#pragma unroll
      for (int m = 0; m < 2 * kM; ++m) {
        float sum = bias_sums[m];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        const int j = own + m * 8 + lane / 4;
        if (lane % 4 == 0 && j < own_len) pass.dkey_bias[at + j] = sum;
        bias_sums[m] = 0.0f;
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  const int64_t begin = kByKeys ? sequence.k_begin : sequence.q_begin;
  if (pass.d_first.data)
    write_sums<kM * 16, kWidth>(first_sums, in.rules.scale, a, S::kPitch,
                                pass.d_first.rows<T>(place.b, own_head, begin), own, own_len,
                                column, in.dim);
  if constexpr (kByKeys)
    if (pass.d_second.data)
      write_sums<kM * 16, kWidth>(second_sums, in.rules.keep_scale, b, S::kPitch,
                                  pass.d_second.rows<T>(place.b, own_head, begin), own, own_len,
                                  column, in.value_dim);
}

template <class T, int kDim, bool kByKeys>
void run(const CudaStream& stream, Pass pass) {
  using S = GradientShape<T, kDim>;
  const Backward& in = pass.in;
  const int64_t tiles = in.sequences.tiles(kByKeys, S::kOwn);
  const int heads = kByKeys ? in.rules.heads / in.rules.group : in.rules.heads;
  if (tiles == 0) return;
  pass.tiles = static_cast<int>(tiles);
  pass.chunks =
      static_cast<int>(ceil_div(kByKeys ? max(in.dim, in.value_dim) : in.dim, kOut<kByKeys, kDim>));
  const Grid grid{blocks_of(tiles * pass.chunks * heads), S::kLanes, in.shared<S>()};
  launch(stream, kByKeys ? "attention: dk, dv" : "attention: dq", gradient_kernel<T, kDim, kByKeys>,
         grid, pass);
}

template <class T, bool kByKeys>
void run(const CudaStream& stream, const Pass& pass) {
  const int dim = max(pass.in.dim, pass.in.value_dim);
  if (dim <= 64) run<T, 64, kByKeys>(stream, pass);
  else if (dim <= 128) run<T, 128, kByKeys>(stream, pass);
  else if (dim <= 256) run<T, 256, kByKeys>(stream, pass);
  else run<T, 512, kByKeys>(stream, pass);
}

template <bool kByKeys>
void run(const CudaStream& stream, DType dtype, const Pass& pass) {
  if (dtype == DType::f32) run<float, kByKeys>(stream, pass);
  else if (dtype == DType::bf16) run<__nv_bfloat16, kByKeys>(stream, pass);
  else run<__half, kByKeys>(stream, pass);
}

}  // namespace

int64_t scratch_bytes(int64_t rows) { return rows * 3 * 4; }

void backward(const CudaStream& stream, const Problem& p, const Packed& packed, const Gradients& g,
              void* scratch) {
  if (!packed.given() && hopper_wanted(stream.device) && hopper_takes(p, g))
    return hopper_backward(stream, p, g, scratch);
  const RowFacts facts(scratch, rows_of(p, packed));
  row_facts(stream, p, packed, g, facts);
  const Backward in(p, packed, g, facts);
  const Array none(Operand{}, packed);
  if (g.dq.data) run<false>(stream, p.q.dtype, {in, Array(g.dq, packed), none, nullptr, 0, 0, 0});
  if (g.dk.data || g.dv.data || g.dkey_bias)
    run<true>(stream, p.q.dtype,
              {in, Array(g.dk, packed), Array(g.dv, packed), static_cast<float*>(g.dkey_bias),
               static_cast<int>(p.key_bias_heads), 0, 0});
  if (g.dsink) sink_gradient(stream, p, packed, facts, static_cast<float*>(g.dsink));
  if (g.dbias.data) bias_gradient(stream, p, in, g.dbias);
}

}  // namespace pentad::attention::cuda
