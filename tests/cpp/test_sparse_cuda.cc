// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, executed on the CPU lane by lane, against the definitions: odd sizes, strides,
// every option, each order of the lanes.
#include <cmath>
#include <vector>

#include "check.h"
#include "orders.h"
#include "sparse/splade_cuda.h"
#include "splade_case.h"

using namespace pentad;
using namespace pentad::sparse;

namespace {

const CudaStream stream;

// Memory of exactly this size, so that the sanitizer sees what goes past it.
std::vector<char> room(int64_t bytes) { return std::vector<char>(bytes, 7); }

void cuda_forward(const SpladeHead& head, const SpladeOutputs& outputs) {
  auto scratch = room(cuda::splade_scratch(head.batch(), head.length()));
  cuda::splade_head(stream, head, outputs, scratch.data());
}

void cuda_backward(const SpladeHead& head, const SpladeGradients& gradients) {
  auto scratch = room(cuda::splade_backward_scratch(head));
  cuda::splade_head_backward(stream, head, gradients, scratch.data());
}

void as_the_definition(Case& c) {
  const Results want = c.run(reference_splade_head, reference_splade_head_backward);
  const Results got = c.run(cuda_forward, cuda_backward, &want);
  // A rounding to the dtype, or two in the gradients of a sum, and those of sums in float32.
  const double allowed = c.dtype == DType::f32 ? 3e-6 : c.dtype == DType::f16 ? 1e-3 : 8e-3;
  for (int i = 0; i < 4; ++i)
    CHECK(furthest(got.arrays[i], want.arrays[i], c.dtype) < allowed, static_cast<int>(c.dtype),
          c.dim, i, furthest(got.arrays[i], want.arrays[i], c.dtype));
  for (int64_t i = 0; i < c.b * c.vocab && c.head.pooling == SpladePooling::max; ++i)
    CHECK(got.place[i] == want.place[i] ||
              std::abs(got.top[i] - want.top[i]) <= 1e-5 * (1 + want.top[i]),
          c.dim, i, got.place[i], want.place[i]);
}

void heads() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (auto [b, length, dim, vocab] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{2, 1, 1, 1},
                                         {3, 13, 16, 130},
                                         {2, 150, 37, 20},
                                         {2, 7, 1072, 9},
                                         {40, 5, 24, 7}})
      for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum}) {
        Case c(b, length, dim, vocab, dtype);
        c.head.pooling = pooling;
        c.head.activation = static_cast<SpladeActivation>(dim % 2);
        if (dim == 24) c.head.mask.reset(), c.head.bias.reset();
        as_the_definition(c);
      }
}

// Every array with other strides: hidden as (L, B, H) with a gap, weight as columns, d_out turned.
void strided_heads() {
  for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum})
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case c(3, 20, 16, 24, dtype);
      c.head.pooling = pooling;
      std::vector<char> wide = reals(20 * 3 * 24, dtype, 1);
      c.head.hidden.data = wide.data();
      c.head.hidden.strides[0] = 24, c.head.hidden.strides[1] = 3 * 24;
      as_the_definition(c);
      c.head.weight.strides[0] = 1, c.head.weight.strides[1] = 24;
      c.head.hidden.strides[2] = 1, c.head.hidden.strides[0] = 20, c.head.hidden.strides[1] = 60;
      std::vector<float> mask(3 * 40);
      for (size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<float>(generator() % 2);
      c.head.mask = view(mask.data(), DType::f32, {3, 20});
      c.head.mask->strides[0] = 40, c.head.mask->strides[1] = 2;
      as_the_definition(c);
    }
}

// NaN of a token is NaN of all its words and found at the first token; that of a masked one is not
// read. A mask of other numbers gives NaN too.
void nans() {
  for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum}) {
    Case c(3, 5, 8, 6, DType::f32);
    c.head.pooling = pooling;
    std::fill(c.mask.begin(), c.mask.end(), 1);
    c.mask[5] = c.mask[2] = 0;
    float* hidden = reinterpret_cast<float*>(c.hidden.data());
    hidden[2 * 8 + 3] = NAN;  // masked
    hidden[8 * 8 + 3] = NAN;  // token 3 of the second sequence
    Results r = c.run(cuda_forward, cuda_backward);
    const auto number = [&](int array, int64_t i) {
      return reinterpret_cast<const float*>(r.arrays[array].data())[i];
    };
    for (int64_t v = 0; v < 6; ++v) {
      CHECK(!std::isnan(number(0, v)) && std::isnan(number(0, 6 + v)), v);
      if (pooling == SpladePooling::max) CHECK(r.place[6 + v] == 1, v, r.place[6 + v]);
      CHECK(std::isnan(number(3, v)), v);
    }
    for (int64_t h = 0; h < 8; ++h) {
      CHECK(!std::isnan(number(1, h)) && number(1, 2 * 8 + h) == 0, h);
      const int64_t at = pooling == SpladePooling::max ? 6 : 8;
      CHECK(std::isnan(number(1, at * 8 + h)), h);
    }
    c.mask[0] = 2;
    r = c.run(cuda_forward, [](auto&&...) {});
    for (int64_t v = 0; v < 6; ++v) CHECK(std::isnan(number(0, v)), v);
  }
}

void empty_heads() {
  for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum})
    for (auto [b, length, dim, vocab] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{0, 3, 4, 5},
                                         {2, 0, 4, 5},
                                         {2, 3, 0, 5},
                                         {2, 3, 4, 0}}) {
      Case c(b, length, dim, vocab, DType::bf16);
      c.head.pooling = pooling;
      as_the_definition(c);
    }
}

}  // namespace

int main() {
  in_every_order([] {
    heads();
    strided_heads();
    nans();
    empty_heads();
  });
  return report();
}
