// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of matrix states, executed on the CPU lane by lane, against the definition, on
// random problems and in each order of the lanes.
#include <cstdio>
#include <cstdlib>

#include "common/parallel.h"
#include "matrix_compare.h"
#include "orders.h"
#include "scan/matrix_scan_cuda.h"

using namespace pentad;
using namespace pentad::scan;
using namespace pentad::scan::test;

namespace {

const CudaStream stream;

// Memory of exactly this size, full of NaN.
std::vector<float> room(int64_t bytes) { return std::vector<float>((bytes + 3) / 4, NAN); }

// Integers as a device has them: of 32 or 64 bits, some with a stride.
struct List {
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  cuda::Integers integers;

  explicit List(const std::vector<int64_t>& values) {
    if (values.empty()) return;
    const int64_t stride = pick(1, 2),
                  size = (static_cast<int64_t>(values.size()) - 1) * stride + 1;
    narrow.resize(size), wide.resize(size);
    for (size_t i = 0; i < values.size(); ++i) {
      wide[i * stride] = values[i];
      narrow[i * stride] = static_cast<int32_t>(values[i]);
    }
    const bool is_wide = chance(0.5);
    const void* data = is_wide ? static_cast<void*>(wide.data()) : narrow.data();
    integers = {data, is_wide, stride};
  }
  List(const List&) = delete;
};

// The same bits in every order of the lanes.
template <class C>
void check_results(C& c, const char* entry, double depth, const Arrays& given, const Arrays& blank,
                   const Define<decltype(C::p)>& define,
                   const std::function<void(const Arrays& to)>& kernel) {
  const std::string text = std::string(" of ") + entry + c.text;
  const Arrays expected = blank, bounds = bounds_of(c, depth, given, blank, define);
  define(c.p, given, expected);
  Arrays first;
  in_every_order([&] {
    const Arrays got = blank;
    kernel(got);
    const bool is_first = first.list.empty();
    if (is_first) first = got;
    for (size_t n = 0; n < got.list.size(); ++n) {
      const std::string what = got.list[n].first + text;
      if (is_first)
        compare(what, got.list[n].second, expected.list[n].second, bounds.list[n].second);
      CHECK(got.list[n].second.memory == first.list[n].second.memory, "another order", what);
    }
  });
}

double depth_of(const MatrixScan& p) {
  return static_cast<double>(p.batch * p.length + p.keys + p.values + p.heads);
}

void check_scan(DType dtype, bool small) {
  MatrixCase c(dtype, small);
  const MatrixScan& p = c.p;
  if (p.batch * p.length * p.heads * p.keys * p.values > 1 << 20) return;
  const List begin(p.begin);
  const cuda::Packed packed{begin.integers, p.sequences()};
  check_results(
      c, "forward", depth_of(p), {}, c.results(),
      [](const MatrixScan& q, const Arrays&, const Arrays& to) {
        reference_matrix_scan_forward(q, to["out"], to["last"]);
      },
      [&](const Arrays& to) {
        auto scratch = room(cuda::matrix_forward_scratch(p, packed, false));
        cuda::matrix_forward(stream, p, packed, to["out"], to["last"], nullptr, scratch.data());
      });

  std::vector<float> stored(c.stored_size(), NAN);
  const Arrays results = c.results();
  auto scratch = room(cuda::matrix_forward_scratch(p, packed, true));
  cuda::matrix_forward(stream, p, packed, results["out"], results["last"], stored.data(),
                       scratch.data());
  Arrays given;
  if (chance(0.9)) given.add("out", c.array(c.out_dtype, c.like_v())).fill([] { return normal(); });
  if (chance(0.5))
    given.add("last", c.array(DType::f32, c.like_state())).fill([] { return normal(); });
  check_results(
      c, "backward", depth_of(p), given, c.gradients(),
      [](const MatrixScan& q, const Arrays& from, const Arrays& to) {
        reference_matrix_scan_backward(q, MatrixCase::gradients_of(from, nullptr, to));
      },
      [&](const Arrays& to) {
        auto space = room(cuda::matrix_backward_scratch(p, packed));
        cuda::matrix_backward(stream, p, packed, MatrixCase::gradients_of(given, stored.data(), to),
                              space.data());
      });
}

void check_update(DType dtype) {
  MatrixUpdateCase c(dtype);
  const auto at = [](const MatrixUpdate& from, const Arrays& to) {
    MatrixUpdate p = from;
    p.state = to["state"], p.out = to["out"];
    return p;
  };
  const List rows(c.p.rows);
  check_results(
      c, "", static_cast<double>(c.p.keys), {}, c.results(),
      [&](const MatrixUpdate& p, const Arrays&, const Arrays& to) {
        reference_matrix_update(at(p, to));
      },
      [&](const Arrays& to) {
        cuda::matrix_update(stream, at(c.p, to), rows.integers, c.state.shape[0]);
      });
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 6;
  set_num_threads(2);
  for (int round = 0; round < rounds; ++round)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      check_scan(dtype, true);
      check_scan(dtype, false);
      for (int i = 0; i < 3; ++i) check_update(dtype);
    }
  std::printf("largest error: %.2f of what is allowed, %s\n", worst, worst_at.c_str());
  return report();
}
