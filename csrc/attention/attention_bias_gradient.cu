// SPDX-License-Identifier: Apache-2.0
// The gradient of a bias: ds, added over the batches, heads and keys that share an element of it. A
// block owns a tile of the bias and goes through those, so each sum has one order.
#include "attention/attention_gradient.cuh"

namespace pentad::attention::cuda {
namespace {

struct BiasGradient {
  Backward in;
  float* out;
  int64_t stride[4];
  int batches, heads;  // of the bias
  int q_tiles, k_tiles;
  bool per_key;
};

// q, d_out (b, h, i, ..), k, v (b, h / group, j, ..) -> out (b or 1, h or 1, i, j or 1).
// Limit: tensor cores, 4 Sq Sk dim operations per head; or the bytes of a bias per head.
template <class T, int kDim>
__global__ void __launch_bounds__(GradientShape<T, kDim>::kLanes)
    bias_gradient_kernel(BiasGradient task) {
  using S = GradientShape<T, kDim>;
  constexpr int kM = S::kM, kN = S::kOther / 8;
  const Backward& in = task.in;
  int64_t block = blockIdx.x;
  const int k_tile = static_cast<int>(block % task.k_tiles);
  const int q_first = static_cast<int>((block /= task.k_tiles) % task.q_tiles) * S::kOwn;
  const int first_h = static_cast<int>((block /= task.q_tiles) % task.heads);
  const int first_b = static_cast<int>(block / task.heads);
  const Sequence sequence = in.sequences[0];  // all are of one length
  Shared shared;
  T* own_scores = shared.take<T>(S::kOwnTile);
  T* own_values = shared.take<T>(S::kOwnTile);
  T* other_scores = shared.take<T>(S::kOtherTile);
  T* other_values = shared.take<T>(S::kOtherTile);
  const bool special = in.special();
  float* spare = special ? shared.take<float>(2 * S::kSpare) : nullptr;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = lane_of_warp();
  const int own = q_first + warp * kM * 16;

  float total[kM][kN][4], row_sums[2 * kM] = {};
  clear(total);
  const int key_begin = task.per_key ? k_tile * S::kOther : 0;
  const int key_end = task.per_key ? key_begin + S::kOther : sequence.k_len;
  for (int b = first_b; b < in.sequences.batch; b += task.batches)
    for (int h = first_h; h < in.rules.heads; h += task.heads) {
      const HeadRules head(in.rules, b, h, sequence.q_len, sequence.k_len, 0);
      const HeadFacts facts(in.facts, in.sequences.row_at(sequence, b, h), in.d_key_mass,
                            in.sequences.key_at(sequence, b, h, in.rules.heads));
      const int kv_head = h / in.rules.group;
      __syncthreads();
      load_tile<S::kOwn, kDim, S::kLanes>(own_scores, in.q.rows<T>(b, h, 0), q_first, head.q_len, 0,
                                          in.dim);
      load_tile<S::kOwn, kDim, S::kLanes>(own_values, in.d_out.rows<T>(b, h, 0), q_first,
                                          head.q_len, 0, in.value_dim);
      for (int key = key_begin; key < key_end; key += S::kOther) {
        const Seen tile = head.classify(q_first, q_first + S::kOwn, key, key + S::kOther);
        if (tile == Seen::none) continue;
        __syncthreads();
        load_tile<S::kOther, kDim, S::kLanes>(other_scores, in.k.rows<T>(b, kv_head, 0), key,
                                              head.k_len, 0, in.dim);
        load_tile<S::kOther, kDim, S::kLanes>(other_values, in.v.rows<T>(b, kv_head, 0), key,
                                              head.k_len, 0, in.value_dim);
        cp_async_wait<0>();
        __syncthreads();
        float c[kM][kN][4], d[kM][kN][4];
        clear(c);
        multiply_rows<kDim>(c, own_scores + warp * kM * 16 * S::kPitch, other_scores, in.dim);
        clear(d);
        multiply_rows<kDim>(d, own_values + warp * kM * 16 * S::kPitch, other_values, in.value_dim);
        const bool whole = tile == Seen::all;
        const uint64_t seen = whole ? ~uint64_t{0} : seen_bits<false, kM, kN>(head, own, key);
        score_gradients<T, false, false>(head, facts, special, in.dropout, whole, seen, own, key, c,
                                         d, row_sums, spare);
#pragma unroll
        for (int e = 0; e < kM * kN * 4; ++e)
          total[e / (4 * kN)][e / 4 % kN][e % 4] += d[e / (4 * kN)][e / 4 % kN][e % 4];
      }
      cp_async_wait<0>();
    }

  const int64_t at = first_b * task.stride[0] + first_h * task.stride[1];
  if (task.per_key) {
#pragma unroll
    for (int e = 0; e < kM * kN * 4; ++e) {
      const Element<kN> place(e);
      const int i = own + place.row, j = key_begin + place.column;
      if (i < sequence.q_len && j < sequence.k_len)
        task.out[at + i * task.stride[2] + j * task.stride[3]] =
            total[e / (4 * kN)][e / 4 % kN][e % 4];
    }
  } else {
#pragma unroll
    for (int m = 0; m < 2 * kM; ++m) {
      float sum = row_sums[m];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int i = own + m * 8 + lane / 4;
      if (lane % 4 == 0 && i < sequence.q_len) task.out[at + i * task.stride[2]] = sum;
    }
  }
}

template <class T, int kDim>
void run(const CudaStream& stream, BiasGradient task) {
  using S = GradientShape<T, kDim>;
  task.q_tiles = static_cast<int>(ceil_div(task.in.sequences.max_q, S::kOwn));
  task.k_tiles = task.per_key ? static_cast<int>(ceil_div(task.in.sequences.max_k, S::kOther)) : 1;
  const int64_t blocks = int64_t{task.batches} * task.heads * task.q_tiles * task.k_tiles;
  if (blocks == 0) return;
  launch(stream, "attention: dbias", bias_gradient_kernel<T, kDim>,
         Grid{blocks_of(blocks), S::kLanes, task.in.shared<S>()}, task);
}

template <class T>
void run(const CudaStream& stream, const BiasGradient& task) {
  if (max(task.in.dim, task.in.value_dim) <= 128) run<T, 128>(stream, task);
  else run<T, 512>(stream, task);
}

}  // namespace

void bias_gradient(const CudaStream& stream, const Problem& p, const Backward& in,
                   const Operand& dbias) {
  BiasGradient task{in,
                    static_cast<float*>(dbias.data),
                    {dbias.stride[0], dbias.stride[1], dbias.stride[2], dbias.stride[3]},
                    dbias.stride[0] ? in.sequences.batch : 1,
                    dbias.stride[1] ? in.sequences.heads : 1,
                    0,
                    0,
                    dbias.stride[3] != 0};
  if (p.q.dtype == DType::f32) run<float>(stream, task);
  else if (p.q.dtype == DType::bf16) run<__nv_bfloat16>(stream, task);
  else run<__half>(stream, task);
}

}  // namespace pentad::attention::cuda
