// SPDX-License-Identifier: Apache-2.0
// The attention kernels alone, per instruction-set level: GF/s beside the peak measured here.
//
//   bench_attention [--quick]
//   bench_attention f32|bf16|f16 BATCH HEADS LENGTH DIM full|causal [ROUNDS]   (best level only)
//
// Multiply-adds count two; causal counts half; the backward pass counts five products to the
// forward's two.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_drive.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "timing.h"

using namespace pentad;
using namespace pentad::attention;

namespace {

double peak_gflops(bool bf16) {
  constexpr int64_t kRounds = 200000;
  const int threads = num_threads();
  double best = 1e9;
  for (int i = 0; i < 5; ++i)
    best =
        std::min(best, median_seconds(3, [&] {
                   parallel_for(threads, [&](int64_t) { kernels().multiply_adds(kRounds, bf16); });
                 }));
  const double per_round = kPeakSums * 2.0 * kernels().lanes * (bf16 ? 2 : 1);
  return threads * kRounds * per_round / best / 1e9;
}

struct Case {
  DType dtype;
  int64_t batch, heads, length, dim;
  bool causal;
};

const char* dtype_name(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
}

// A case with its arrays; bit patterns are drawn so that they are valid in each dtype.
class Arrays {
 public:
  explicit Arrays(const Case& c) : c_(c), element_(c.dtype == DType::f32 ? 4 : 2) {
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    for (auto* array : {&q_, &k_, &v_, &d_out_, &out_, &dq_, &dk_, &dv_}) array->resize(bytes());
    for (auto* array : {&q_, &k_, &v_, &d_out_}) {
      std::vector<float> values(c.dim);
      for (int64_t row = 0; row < c.batch * c.heads * c.length; ++row) {
        for (float& x : values) x = normal(random);
        kernels().write_rows(values.data(), 0, 1.0f, 1, c.dim, c.dtype,
                             array->data() + row * c.dim * element_, 0, 1);
      }
    }
    lse_.resize(c.batch * c.heads * c.length);
    problem.batch = c.batch;
    problem.heads = problem.kv_heads = c.heads;
    problem.dim = problem.value_dim = c.dim;
    problem.max_q = problem.max_k = c.length;
    problem.q = operand(q_);
    problem.k = operand(k_);
    problem.v = operand(v_);
    problem.scale = 1.0 / std::sqrt(static_cast<double>(c.dim));
    if (c.causal) problem.right = 0;
    outputs.out = operand(out_);
    outputs.lse = {lse_.data(), DType::f64, {c.heads * c.length, c.length, 1, 0}};
    gradients.out = outputs.out;
    gradients.lse = outputs.lse;
    gradients.d_out = operand(d_out_);
    gradients.dq = operand(dq_);
    gradients.dk = operand(dk_);
    gradients.dv = operand(dv_);
  }

  // Three rows of the first head, in double.
  bool is_right() const {
    for (int64_t i : {int64_t{0}, c_.length / 2, c_.length - 1}) {
      const int64_t keys = c_.causal ? i + 1 : c_.length;
      std::vector<double> p(keys), expected(c_.dim);
      double sum = 0.0;
      for (int64_t j = 0; j < keys; ++j) {
        double dot = 0.0;
        for (int64_t d = 0; d < c_.dim; ++d) dot += at(q_, i, d) * at(k_, j, d);
        sum += p[j] = std::exp(dot * problem.scale);
      }
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t d = 0; d < c_.dim; ++d) expected[d] += p[j] / sum * at(v_, j, d);
      // Of numbers near 1: fp32 sums, bf16 probabilities (2^-9 each), rounding of the output.
      const double tolerance = c_.dtype == DType::f32 ? 1e-5 : 2e-2;
      for (int64_t d = 0; d < c_.dim; ++d)
        if (!(std::abs(at(out_, i, d) - expected[d]) < tolerance)) return false;
    }
    return true;
  }

  double flops() const {
    return 4.0 * c_.batch * c_.heads * c_.length * c_.length * c_.dim / (c_.causal ? 2 : 1);
  }

  Problem problem;
  Outputs outputs;
  Gradients gradients;

 private:
  int64_t bytes() const { return c_.batch * c_.heads * c_.length * c_.dim * element_; }
  Operand operand(std::vector<char>& array) const {
    return {array.data(), c_.dtype, {c_.heads * c_.length * c_.dim, c_.length * c_.dim, c_.dim, 1}};
  }
  double at(const std::vector<char>& array, int64_t row, int64_t d) const {
    float x;
    const Rows one = {array.data() + (row * c_.dim + d) * element_, nullptr, c_.dtype, 0, 1, 1, 1};
    kernels().pack_rows(one, false, &x);
    return x;
  }

  Case c_;
  int64_t element_;
  std::vector<char> q_, k_, v_, d_out_, out_, dq_, dk_, dv_;
  std::vector<double> lse_;
};

bool measure(const Case& c, int rounds, double peak) {
  Arrays arrays(c);
  const double ahead = median_seconds(rounds, [&] { forward(arrays.problem, arrays.outputs); });
  if (!arrays.is_right()) {
    std::printf("%s: wrong answer\n", name(isa()));
    return false;
  }
  const double back = median_seconds(rounds, [&] { backward(arrays.problem, arrays.gradients); });
  const double f = arrays.flops() / ahead / 1e9, b = 2.5 * arrays.flops() / back / 1e9;
  std::printf("%-5s %-5s %3ld,%3ld,%5ld,%3ld %-7s %8.0f %4.0f%% %9.0f %4.0f%%\n", name(isa()),
              dtype_name(c.dtype), static_cast<long>(c.batch), static_cast<long>(c.heads),
              static_cast<long>(c.length), static_cast<long>(c.dim), c.causal ? "causal" : "full",
              f, 100 * f / peak, b, 100 * b / peak);
  std::fflush(stdout);
  return true;
}

double peak_for(DType dtype) { return peak_gflops(dtype == DType::bf16 && kernels().dot_bf16); }

}  // namespace

int main(int argc, char** argv) {
  std::printf("%d threads, %s\n", num_threads(), thread_runtime());
  std::printf("level dtype   B,  H,    S,  D          forward  peak  backward  peak   (GF/s)\n");
  if (argc >= 7) {
    const DType dtype = !std::strcmp(argv[1], "f32")    ? DType::f32
                        : !std::strcmp(argv[1], "bf16") ? DType::bf16
                                                        : DType::f16;
    const Case c = {dtype,
                    std::atoll(argv[2]),
                    std::atoll(argv[3]),
                    std::atoll(argv[4]),
                    std::atoll(argv[5]),
                    !std::strcmp(argv[6], "causal")};
    return measure(c, argc > 7 ? std::atoi(argv[7]) : 7, peak_for(dtype)) ? 0 : 1;
  }
  const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
  const int64_t length = quick ? 256 : 1024;
  for (Isa level : isa_available()) {
    set_isa(level);
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const double peak = peak_for(dtype);
      for (int64_t dim : {64, 128})
        for (bool causal : {false, true})
          if (!measure({dtype, 1, 8, length, dim, causal}, quick ? 3 : 7, peak)) return 1;
    }
  }
  return 0;
}
