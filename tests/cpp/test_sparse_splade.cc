// SPDX-License-Identifier: Apache-2.0
// The SPLADE head of every level against the definition; rows of few values against plain loops.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "splade_case.h"

using namespace pentad;
using namespace pentad::sparse;

namespace {

void heads_are_as_the_definition() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (auto [b, length, dim, vocab] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{2, 1, 1, 1},
                                         {3, 13, 16, 64},
                                         {3, 100, 33, 131},
                                         {2, 7, 530, 70},
                                         {50, 50, 70, 20}})
      for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum}) {
        Case c(b, length, dim, vocab, dtype);
        c.head.pooling = pooling;
        c.head.activation = static_cast<SpladeActivation>(dim % 2);
        const Results want = c.run(reference_splade_head, reference_splade_head_backward);
        for (Isa level : isa_available()) {
          set_isa(level);
          set_num_threads(1);
          const Results got = c.run(splade_head, splade_head_backward, &want);
          // A rounding to the dtype, and those of sums in float32.
          const double allowed = dtype == DType::f32 ? 3e-6 : dtype == DType::f16 ? 1e-3 : 8e-3;
          for (int i = 0; i < 4; ++i)
            CHECK(furthest(got.arrays[i], want.arrays[i], dtype) < allowed, name(level),
                  static_cast<int>(dtype), dim, i, furthest(got.arrays[i], want.arrays[i], dtype));
          int64_t other = 0;
          for (int64_t i = 0; i < b * vocab && pooling == SpladePooling::max; ++i)
            other += got.place[i] != want.place[i] &&
                     std::abs(got.top[i] - want.top[i]) > 1e-5 * (1 + want.top[i]);
          CHECK(other == 0, name(level), dim);
          const Results one = c.run(splade_head, splade_head_backward);
          for (int threads : {2, 5}) {
            set_num_threads(threads);
            const Results same = c.run(splade_head, splade_head_backward);
            CHECK(same.arrays == one.arrays, name(level), dim, threads);
            if (pooling == SpladePooling::max) CHECK(same.place == one.place, name(level), dim);
          }
        }
      }
}

template <class Call>
bool refused(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void bad_masks_and_places_are_refused() {
  for (DType dtype : {DType::f32, DType::f64}) {
    Case c(3, 5, 4, 6, dtype);
    std::vector<char> out(3 * 6 * 8);
    c.mask[7] = 2;
    CHECK(refused([&] { splade_head(c.head, {out.data(), nullptr, nullptr}); }));
    c.mask[7] = 0;
    std::vector<double> top(3 * 6, 1);
    for (int32_t place : {-2, 2, 5, 1 << 30}) {  // token 2 of the second sequence is masked
      std::vector<int32_t> places(3 * 6, -1);
      places[6] = place;
      CHECK(refused([&] {
              splade_head_backward(c.head, {view(c.d_out.data(), dtype, {3, 6}), top.data(),
                                            places.data(), nullptr, nullptr, out.data()});
            }),
            place);
    }
  }
}

void few_values_are_kept() {
  for (int64_t columns : {1, 5, 1000})
    for (int64_t k : {1, 3, 999, 2000}) {
      std::vector<float> x(4 * columns);
      for (float& value : x) value = static_cast<float>(generator() % 7);
      std::vector<float> want(x.size());
      for (int64_t r = 0; r < 4; ++r) {
        std::vector<int64_t> order;
        for (int64_t c = 0; c < columns; ++c)
          if (x[r * columns + c] != 0) order.push_back(r * columns + c);
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return x[a] > x[b]; });
        for (int64_t i = 0; i < std::min<int64_t>(k, order.size()); ++i)
          want[order[i]] = x[order[i]];
      }
      splade_keep(x.data(), DType::f32, 4, columns, k);
      CHECK(x == want, columns, k);
      std::vector<int64_t> indptr(5);
      splade_count(x.data(), DType::f32, 4, columns, indptr.data());
      std::vector<int64_t> indices(indptr[4]);
      std::vector<float> values(indptr[4]), back(x.size());
      splade_compress(x.data(), DType::f32, 4, columns, indptr.data(), indices.data(),
                      values.data());
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t e = indptr[r]; e < indptr[r + 1]; ++e) {
          CHECK(e == indptr[r] || indices[e - 1] < indices[e]);
          back[r * columns + indices[e]] = values[e];
        }
      CHECK(back == x, columns, k);
      CHECK(std::count(values.begin(), values.end(), 0.0f) == 0);
    }
}

}  // namespace

int main() {
  heads_are_as_the_definition();
  bad_masks_and_places_are_refused();
  few_values_are_kept();
  return report();
}
