// SPDX-License-Identifier: Apache-2.0
// What the backward pass knows of a row before it begins, and sums of probabilities: the mass of keys
// and the part of delta that its gradient adds.
#include "attention/attention_sums.cuh"

namespace pentad::attention::cuda {
namespace {

constexpr int kLanes = 256;

// --- Row facts --------------------------------------------------------------------------------------

struct FactsTask {
  Sequences sequences;
  Operand out, lse, d_out, d_lse;
  int value_dim;
  RowFacts facts;
  int64_t rows;
};

template <class T>
__device__ float row_product(const Operand& x, const Operand& y, int64_t b, int64_t h, int64_t i,
                             int columns) {
  const T* a = static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
  const T* c = static_cast<const T*>(y.data) + b * y.stride[0] + h * y.stride[1] + i * y.stride[2];
  float sum = 0;
  for (int n = lane_of_warp(); n < columns; n += 32)
    sum = fmaf(to_float(a[n * x.stride[3]]), to_float(c[n * y.stride[3]]), sum);
  return sum;
}

// out, d_out (b, h, i, value_dim), lse, d_lse (b, h, i) -> facts (b, h, i), a warp for each row.
// Limit: memory, two rows of value_dim.
template <class T>
__global__ void __launch_bounds__(kLanes) facts_kernel(FactsTask task) {
  const int64_t row = int64_t{blockIdx.x} * (kLanes / 32) + threadIdx.x / 32;
  if (row >= task.rows) return;
  const int64_t i = row % task.sequences.max_q, pair = row / task.sequences.max_q;
  const int64_t b = task.sequences.is_packed() ? 0 : pair / task.sequences.heads;
  const int64_t h = pair % task.sequences.heads;
  float delta = 0;
  if (task.d_out.data) {
    delta = row_product<T>(task.out, task.d_out, b, h, i, task.value_dim);
    for (int by = 16; by; by /= 2) delta += __shfl_xor_sync(kFullWarp, delta, by);
    if (task.d_lse.data) delta -= static_cast<float>(read_real_at(task.d_lse, b, h, i));
  }
  if (lane_of_warp() != 0) return;
  const double lse = read_real_at(task.lse, b, h, i) / kLn2;
  const auto base = static_cast<float>(lse);
  const bool finite = fabsf(base) < infinity();
  const bool nothing = base == -infinity();
  task.facts.base[row] = nothing ? infinity() : base;
  task.facts.low[row] = nothing ? infinity() : finite ? static_cast<float>(lse - base) : 0.0f;
  task.facts.delta[row] = delta;
}

// --- Sums of probabilities --------------------------------------------------------------------------

template <class T, int kDim>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 4 && kDim > 128;
  static constexpr int kM = 1, kWarps = kWide ? 2 : 4, kOwn = kWarps * 16, kLanes = kWarps * 32;
  static constexpr int kOther = kWide ? 16 : 32, kPitch = pitch_of<T>(kDim);
  static constexpr int kSpare = kLanes * kM * kOther / 2;
  static constexpr size_t kShared =
      shared_bytes<T>(kOwn * kPitch) + shared_bytes<T>(kOther * kPitch);
};

struct SumTask {
  Rules rules;
  Sequences sequences;
  Array q, k;
  RowFacts facts;
  const float* weights;  // of the keys (b, h, j), where queries own
  float* out;
  int dim, tiles;
};

// q (b, h, i, dim), k (b, h / group, j, dim) -> out (b, h, j) = sum_i p_ij where keys own, and
// out (b, h, i) += sum_j p_ij weight_j where queries do.
// Limit: tensor cores, 2 Sq Sk dim operations per head.
template <class T, int kDim, bool kByKeys>
__global__ void __launch_bounds__(Shape<T, kDim>::kLanes) sum_kernel(SumTask task) {
  using S = Shape<T, kDim>;
  constexpr int kM = S::kM, kN = S::kOther / 8;
  const int h = static_cast<int>(blockIdx.x / task.tiles);
  const TilePlace place =
      task.sequences.tile(kByKeys, S::kOwn, static_cast<int>(blockIdx.x % task.tiles));
  const Sequence sequence = task.sequences[place.b];
  const int own_len = kByKeys ? sequence.k_len : sequence.q_len;
  const int other_len = kByKeys ? sequence.q_len : sequence.k_len;
  if (place.first >= own_len) return;
  const HeadRules head(task.rules, place.b, h, sequence.q_len, sequence.k_len, sequence.k_begin);
  const auto q = task.q.rows<T>(place.b, h, sequence.q_begin);
  const auto k = task.k.rows<T>(place.b, h / task.rules.group, sequence.k_begin);
  const int64_t row_at = task.sequences.row_at(sequence, place.b, h);
  const int64_t key_at = task.sequences.key_at(sequence, place.b, h, task.rules.heads);
  const float *base = task.facts.base + row_at, *low = task.facts.low + row_at;

  Shared shared;
  T* own_tile = shared.take<T>(S::kOwn * S::kPitch);
  T* other_tile = shared.take<T>(S::kOther * S::kPitch);
  float* spare = task.rules.modify() ? shared.take<float>(S::kSpare) : nullptr;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = lane_of_warp();
  const int own = place.first + warp * kM * 16;
  float sums[2 * kM] = {};
  load_tile<S::kOwn, kDim, S::kLanes>(own_tile, kByKeys ? k : q, place.first, own_len, 0, task.dim);
  Walk<kByKeys, S::kOwn, S::kOther> walk(head, place.first);
  while (walk.next()) {
    __syncthreads();
    load_tile<S::kOther, kDim, S::kLanes>(other_tile, kByKeys ? q : k, walk.first, other_len, 0,
                                          task.dim);
    cp_async_wait<0>();
    __syncthreads();
    float c[kM][kN][4];
    clear(c);
    multiply_rows<kDim>(c, own_tile + warp * kM * 16 * S::kPitch, other_tile, task.dim);
    const uint64_t seen =
        walk.whole ? ~uint64_t{0} : seen_bits<kByKeys, kM, kN>(head, own, walk.first);
    to_scores<kByKeys>(head, seen, own, walk.first, c, spare);
#pragma unroll
    for (int e = 0; e < kM * kN * 4; ++e) {
      const Pair<kByKeys, kN> at(e, own, walk.first);
      if (!(seen >> e & 1) || at.i >= sequence.q_len) continue;
      const float p = exp2_of<T>(c[e / (4 * kN)][e / 4 % kN][e % 4] - base[at.i] - low[at.i]);
      // A row without any weight has none for keys of NaN either.
      if (low[at.i] == infinity()) continue;
      sums[e / (4 * kN) * 2 + e % 4 / 2] += kByKeys ? p : p * task.weights[key_at + at.j];
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int m = 0; m < 2 * kM; ++m) {
    float sum = sums[m];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const int row = own + m * 8 + lane / 4;
    if (lane % 4 || row >= own_len) continue;
    if (kByKeys) task.out[key_at + row] = sum;
    else task.out[row_at + row] += sum;
  }
}

template <class T, int kDim, bool kByKeys>
void run_sums(const CudaStream& stream, SumTask task) {
  using S = Shape<T, kDim>;
  const int64_t tiles = task.sequences.tiles(kByKeys, S::kOwn);
  if (tiles == 0) return;
  task.tiles = static_cast<int>(tiles);
  launch(stream, "attention: sums of p", sum_kernel<T, kDim, kByKeys>,
         Grid{blocks_of(tiles * task.rules.heads), S::kLanes,
              S::kShared + (task.rules.modify() ? shared_bytes<float>(S::kSpare) : 0)},
         task);
}

template <class T, bool kByKeys>
void run_sums(const CudaStream& stream, const SumTask& task) {
  if (task.dim <= 128) run_sums<T, 128, kByKeys>(stream, task);
  else run_sums<T, 512, kByKeys>(stream, task);
}

template <bool kByKeys>
void run_sums(const CudaStream& stream, DType dtype, const SumTask& task) {
  if (dtype == DType::f32) run_sums<float, kByKeys>(stream, task);
  else if (dtype == DType::bf16) run_sums<__nv_bfloat16, kByKeys>(stream, task);
  else run_sums<__half, kByKeys>(stream, task);
}

SumTask sum_task(const Problem& p, const Packed& packed, const RowFacts& facts,
                 const float* weights, float* out) {
  return {Rules(p, packed.given()),
          Sequences(p, packed),
          Array(p.q, packed),
          Array(p.k, packed),
          facts,
          weights,
          out,
          static_cast<int>(p.dim),
          0};
}

// --- The sink ---------------------------------------------------------------------------------------

// facts (batch, heads, rows), sink (heads) -> dsink (heads), a block for each head.
// Limit: memory, 12 bytes per row.
__global__ void __launch_bounds__(kLanes)
    sink_kernel(RowFacts facts, const float* sink, int64_t batch, int64_t rows, float* dsink) {
  const int64_t h = blockIdx.x, heads = gridDim.x;
  const int tid = static_cast<int>(threadIdx.x);
  Shared shared;
  double* parts = shared.take<double>(kLanes);
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = tid; i < rows; i += kLanes) {
      const int64_t at = (b * heads + h) * rows + i;
      if (facts.low[at] == infinity()) continue;
      sum -= exp2f(sink[h] * kLog2e - facts.base[at] - facts.low[at]) * facts.delta[at];
    }
  parts[tid] = sum;
  for (int half = kLanes / 2; half; half /= 2) {
    __syncthreads();
    if (tid < half) parts[tid] += parts[tid + half];
  }
  if (tid == 0) dsink[h] = static_cast<float>(parts[0]);
}

}  // namespace

void row_facts(const CudaStream& stream, const Problem& p, const Packed& packed,
               const Gradients& given, const RowFacts& facts) {
  const Sequences sequences(p, packed);
  const FactsTask task{sequences,
                       sequences.rows_of(given.out),
                       sequences.rows_of(given.lse),
                       sequences.rows_of(given.d_out),
                       sequences.rows_of(given.d_lse),
                       static_cast<int>(p.value_dim),
                       facts,
                       rows_of(p, packed)};
  if (task.rows == 0) return;
  const Grid grid{blocks_of(ceil_div(task.rows, kLanes / 32)), kLanes};
  launch(stream, "attention: row facts",
         p.q.dtype == DType::f32    ? facts_kernel<float>
         : p.q.dtype == DType::bf16 ? facts_kernel<__nv_bfloat16>
                                    : facts_kernel<__half>,
         grid, task);
  if (given.d_key_mass && given.d_out.data)
    run_sums<false>(
        stream, p.q.dtype,
        sum_task(p, packed, facts, static_cast<const float*>(given.d_key_mass), facts.delta));
}

void key_mass(const CudaStream& stream, const Problem& p, const Packed& packed, const Operand& lse,
              float* mass, void* scratch) {
  const RowFacts facts(scratch, rows_of(p, packed));
  Gradients given;
  given.lse = lse;
  row_facts(stream, p, packed, given, facts);
  run_sums<true>(stream, p.q.dtype, sum_task(p, packed, facts, nullptr, mass));
}

void sink_gradient(const CudaStream& stream, const Problem& p, const Packed& packed,
                   const RowFacts& facts, float* dsink) {
  launch(stream, "attention: dsink", sink_kernel,
         Grid{blocks_of(p.heads), kLanes, shared_bytes<double>(kLanes)}, facts,
         static_cast<const float*>(p.sink), packed.given() ? 1 : p.batch, p.max_q, dsink);
}

}  // namespace pentad::attention::cuda
