// SPDX-License-Identifier: Apache-2.0
// The scan kernels alone, per instruction-set level: elements/ns beside what the peaks measured here
// would allow.
//
//   bench_scan [--quick] [scan|matrix|recurrence|conv ...]
//
// An element of a selective scan is one (channel, step, state), of a matrix state one (head, step,
// key, value), else one (channel, step). Its limit is the peak of multiply-adds over the vector
// instructions that its formula needs (a decay is 9: six multiply-adds, rounding, a remainder and
// the scaling), or the rate at which memory can be read over its bytes, whichever is less. For
// matrix states these are all multiply-adds, in the count of the recurrence: GFLOP/s is twice
// their number, of which chunks and groups may save some.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/attention_drive.h"
#include "common/ceil_div.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/reals.h"
#include "common/stream_read.h"
#include "scan/matrix_scan.h"
#include "scan/scan.h"
#include "timing.h"

using namespace pentad;
using namespace pentad::scan;

namespace {

// Arrays that live as long as the case.
class Case {
 public:
  std::string name;
  std::string shape;
  double elements = 0;
  double instructions[2] = {};  // vector instructions per element, forward and backward
  double bytes[2] = {};         // per element
  // Each writes the arrays that it is given in their order.
  std::function<void(const std::vector<Operand>&)> forward, backward, define_forward,
      define_backward;
  std::vector<std::vector<int64_t>> results, gradients;  // their shapes
  bool by_time = false;                                  // (b, d, t) with d contiguous
  size_t own = 0;         // this many results and gradients have the dtype; 0: those of rank 3
  bool products = false;  // the instructions are multiply-adds alone

  explicit Case(DType dtype) : dtype_(dtype) {}

  Operand array(DType dtype, const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (int64_t size : shape) n *= size;
    memory_.push_back(std::make_unique<std::vector<uint8_t>>(n * size_of(dtype)));
    Operand x{memory_.back()->data(), dtype, {}};
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i]) x.stride[i] = step;
    if (by_time && shape.size() == 3) x.stride[1] = 1, x.stride[2] = shape[1];
    return x;
  }
  Operand array(const std::vector<int64_t>& shape) { return array(dtype_, shape); }
  Operand random(DType dtype, const std::vector<int64_t>& shape, double low, double high) {
    const Operand x = array(dtype, shape);
    std::uniform_real_distribution<double> uniform(low, high);
    const int64_t n = static_cast<int64_t>(memory_.back()->size()) / size_of(dtype);
    for (int64_t i = 0; i < n; ++i) write_real(x.data, dtype, i, uniform(generator_));
    return x;
  }
  Operand random(const std::vector<int64_t>& shape, double low, double high) {
    return random(dtype_, shape, low, high);
  }
  std::vector<Operand> arrays(const std::vector<std::vector<int64_t>>& shapes) {
    std::vector<Operand> all;
    for (const auto& shape : shapes) all.push_back(array(shape));
    return all;
  }
  DType dtype() const { return dtype_; }

 private:
  DType dtype_;
  std::mt19937 generator_{1};
  std::vector<std::unique_ptr<std::vector<uint8_t>>> memory_;
};

using CasePointer = std::unique_ptr<Case>;

std::string text_of(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ",") + std::to_string(size);
  return text;
}

CasePointer scan_case(DType dtype, int64_t dim, int64_t length, int64_t states) {
  auto c = std::make_unique<Case>(dtype);
  auto p = std::make_shared<SelectiveScan>();
  p->batch = 1, p->dim = dim, p->length = length, p->states = states, p->softplus = true;
  const std::vector<int64_t> u = {1, dim, length}, b = {1, 1, states, length}, a = {dim, states};
  p->u = c->random(u, -1, 1), p->delta = c->random(u, -4, 0), p->z = c->random(u, -1, 1);
  p->a = c->random(DType::f32, a, -16, -0.5);
  p->b = c->random(b, -1, 1), p->c = c->random(b, -1, 1);
  p->d = c->random(DType::f32, {dim}, -1, 1);
  p->delta_bias = c->random(DType::f32, {dim}, -1, 1);
  auto stored =
      std::make_shared<std::vector<float>>(stored_chunks(1, length, false, 1) * dim * states);
  auto d_out = std::make_shared<Operand>(c->random(u, -1, 1));
  c->name = "scan", c->shape = text_of({1, dim, length, states});
  c->elements = static_cast<double>(dim * length * states);
  // dt A, the decay, dt u B, h, y; again, and g, dC, dB, two for w, dA, two sums, the carry.
  c->instructions[0] = 13, c->instructions[1] = 13 + 10;
  c->bytes[0] = 4.0 * static_cast<double>(size_of(dtype)) / static_cast<double>(states);
  c->bytes[1] = 2 * c->bytes[0];
  c->results = {u};
  c->gradients = {u, u, u, a, b, b};
  const auto gradients = [=](const std::vector<Operand>& to) {
    SelectiveScanGradients g;
    g.d_out = *d_out, g.stored = stored->data();
    g.du = to[0], g.ddelta = to[1], g.dz = to[2], g.da = to[3], g.db = to[4], g.dc = to[5];
    return g;
  };
  c->forward = [=](const auto& to) { selective_scan_forward(*p, to[0], {}, stored->data()); };
  c->backward = [=](const auto& to) { selective_scan_backward(*p, gradients(to)); };
  c->define_forward = [=](const auto& to) { reference_selective_scan_forward(*p, to[0], {}); };
  c->define_backward = [=](const auto& to) {
    reference_selective_scan_backward(*p, gradients(to));
  };
  return c;
}

struct MatrixShape {
  const char* name;
  bool delta, key_decay;
  int64_t length, heads, groups, keys, values;
};

CasePointer matrix_case(DType dtype, const MatrixShape& m) {
  auto c = std::make_unique<Case>(dtype);
  auto p = std::make_shared<MatrixScan>();
  p->batch = 1, p->length = m.length, p->heads = m.heads, p->groups = m.groups;
  p->keys = m.keys, p->values = m.values, p->delta = m.delta, p->key_decay = m.key_decay;
  const std::vector<int64_t> q = {1, m.length, m.groups, m.keys},
                             v = {1, m.length, m.heads, m.values}, w = {1, m.length, m.heads};
  std::vector<int64_t> a = w;
  if (m.key_decay) a.push_back(m.keys);
  const double unit = std::sqrt(3.0 / static_cast<double>(m.keys));  // keys of length 1
  p->q = c->random(q, -unit, unit), p->k = c->random(q, -unit, unit), p->v = c->random(v, -1, 1);
  p->a = c->random(DType::f32, a, 0.8, 1), p->w = c->random(DType::f32, w, 0, 1);
  auto stored = std::make_shared<std::vector<float>>(stored_matrices(1, m.length, false, 1) *
                                                     m.heads * m.keys * m.values);
  auto d_out = std::make_shared<Operand>(c->random(v, -1, 1));
  c->name = m.name, c->shape = text_of({m.length, m.heads, m.groups, m.keys, m.values});
  c->elements = static_cast<double>(m.length * m.heads * m.keys * m.values);
  // The decay, k u, o, S^T k; the decay and k u again, and G, D, dq, dk, da, S^T k, two of H and dk.
  c->instructions[0] = 3 + m.delta;
  c->instructions[1] = 8 + 3 * m.delta;
  const double size = static_cast<double>(size_of(dtype));
  const double shared = static_cast<double>(m.groups) / static_cast<double>(m.heads);
  c->bytes[0] =
      size * (2 * shared / static_cast<double>(m.values) + 2 / static_cast<double>(m.keys)) +
      (m.key_decay ? 4 / static_cast<double>(m.values) : 0);
  c->bytes[1] = 2 * c->bytes[0];
  c->own = 3, c->products = true;
  c->results = {v};
  c->gradients = {q, q, v, a, w};
  const auto gradients = [=](const std::vector<Operand>& to) {
    MatrixScanGradients g;
    g.d_out = *d_out, g.stored = stored->data();
    g.dq = to[0], g.dk = to[1], g.dv = to[2], g.da = to[3], g.dw = to[4];
    return g;
  };
  c->forward = [=](const auto& to) { matrix_scan_forward(*p, to[0], {}, stored->data()); };
  c->backward = [=](const auto& to) { matrix_scan_backward(*p, gradients(to)); };
  c->define_forward = [=](const auto& to) { reference_matrix_scan_forward(*p, to[0], {}); };
  c->define_backward = [=](const auto& to) { reference_matrix_scan_backward(*p, gradients(to)); };
  return c;
}

CasePointer recurrence_case(DType dtype, int64_t outer, int64_t inner, int64_t length,
                            bool by_time) {
  auto c = std::make_unique<Case>(dtype);
  c->by_time = by_time;
  auto p = std::make_shared<Recurrence>();
  p->outer = outer, p->inner = inner, p->length = length;
  const std::vector<int64_t> all = {outer, inner, length};
  p->a = c->random(all, 0, 1), p->x = c->random(all, -1, 1);
  auto dh = std::make_shared<Operand>(c->random(all, -1, 1));
  auto h = std::make_shared<Operand>(c->array(all));
  reference_recurrence_forward(*p, *h);
  c->name = by_time ? "recurrence (o,t,i)" : "recurrence (o,i,t)";
  c->shape = text_of({outer, inner, length});
  c->elements = static_cast<double>(outer * inner * length);
  c->instructions[0] = 1, c->instructions[1] = 3;
  c->bytes[0] = 3.0 * static_cast<double>(size_of(dtype));
  c->bytes[1] = 5.0 * static_cast<double>(size_of(dtype));
  c->results = {all};
  c->gradients = {all, all};
  const auto gradients = [=](const std::vector<Operand>& to) {
    return RecurrenceGradients{*h, *dh, to[0], to[1], {}, false};
  };
  c->forward = [=](const auto& to) { recurrence_forward(*p, to[0]); };
  c->backward = [=](const auto& to) { recurrence_backward(*p, gradients(to)); };
  c->define_forward = [=](const auto& to) { reference_recurrence_forward(*p, to[0]); };
  c->define_backward = [=](const auto& to) { reference_recurrence_backward(*p, gradients(to)); };
  return c;
}

CasePointer conv_case(DType dtype, int64_t dim, int64_t length, int64_t width, bool by_time) {
  auto c = std::make_unique<Case>(dtype);
  c->by_time = by_time;
  auto p = std::make_shared<CausalConv>();
  p->batch = 1, p->dim = dim, p->length = length, p->width = width, p->silu = true;
  const std::vector<int64_t> all = {1, dim, length};
  p->x = c->random(all, -1, 1);
  p->weight = c->random(DType::f32, {dim, width}, -1, 1);
  p->bias = c->random(DType::f32, {dim}, -1, 1);
  auto d_out = std::make_shared<Operand>(c->random(all, -1, 1));
  c->name = by_time ? "conv (b,t,d)" : "conv (b,d,t)";
  c->shape = text_of({1, dim, length, width});
  c->elements = static_cast<double>(dim * length);
  // The taps, then a sigmoid of a decay, a sum, a division and a product; again, and both gradients.
  c->instructions[0] = static_cast<double>(width) + 12;
  c->instructions[1] = 3 * static_cast<double>(width) + 16;
  c->bytes[0] = 2.0 * static_cast<double>(size_of(dtype));
  c->bytes[1] = 3.0 * static_cast<double>(size_of(dtype));
  c->results = {all};
  c->gradients = {all, {dim, width}, {dim}};
  const auto gradients = [=](const std::vector<Operand>& to) {
    return CausalConvGradients{*d_out, {}, to[0], to[1], to[2], {}};
  };
  c->forward = [=](const auto& to) { causal_conv_forward(*p, to[0], {}); };
  c->backward = [=](const auto& to) { causal_conv_backward(*p, gradients(to)); };
  c->define_forward = [=](const auto& to) { reference_causal_conv_forward(*p, to[0], {}); };
  c->define_backward = [=](const auto& to) { reference_causal_conv_backward(*p, gradients(to)); };
  return c;
}

// --- Measuring -------------------------------------------------------------------------------------

// Gradients that are sums are float32 whatever the dtype; one array of a shape like u is not.
std::vector<Operand> outputs(Case& c, const std::vector<std::vector<int64_t>>& shapes) {
  std::vector<Operand> all;
  for (const auto& shape : shapes) {
    const bool own = c.own ? all.size() < c.own : shape.size() == 3;
    all.push_back(c.array(own ? c.dtype() : DType::f32, shape));
  }
  return all;
}

bool agrees(Case& c, const std::vector<std::vector<int64_t>>& shapes,
            const std::function<void(const std::vector<Operand>&)>& kernel,
            const std::function<void(const std::vector<Operand>&)>& definition) {
  const std::vector<Operand> got = outputs(c, shapes), expected = outputs(c, shapes);
  kernel(got);
  definition(expected);
  for (size_t k = 0; k < shapes.size(); ++k) {
    int64_t n = 1;
    for (int64_t size : shapes[k]) n *= size;
    const DType dtype = got[k].dtype;
    double most = 1, error = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double x = read_real(expected[k].data, dtype, i);
      most = std::max(most, std::abs(x));
      error = std::max(error, std::abs(read_real(got[k].data, dtype, i) - x));
    }
    if (!(error <= most * (dtype == DType::f32 ? 1e-4 : 1e-2))) {
      std::printf("%s %s: array %zu is off by %g of %g\n", name(isa()), c.name.c_str(), k, error,
                  most);
      return false;
    }
  }
  return true;
}

struct Peaks {
  double instructions;  // full vectors of multiply-adds, as float lanes per ns
  double bytes;         // per ns
};

Peaks measure_peaks() {
  constexpr int64_t kRounds = 200000;
  const attention::Kernels& kernels = attention::kernels();
  const int threads = num_threads();
  double seconds = 1e9;
  for (int i = 0; i < 5; ++i)
    seconds =
        std::min(seconds, median_seconds(3, [&] {
                   parallel_for(threads, [&](int64_t) { kernels.multiply_adds(kRounds, false); });
                 }));
  const std::vector<uint8_t> memory(int64_t{1} << 28, 1);
  const double reading =
      median_seconds(3, [&] { stream_read(memory.data(), static_cast<int64_t>(memory.size())); });
  return {
      static_cast<double>(threads * kRounds * attention::kPeakSums * kernels.lanes) / seconds / 1e9,
      static_cast<double>(memory.size()) / reading / 1e9};
}

enum class Size { check, quick, full };
using Maker = std::function<CasePointer(Size)>;

bool measure(const Maker& make, int rounds, const Peaks& peaks, Size size) {
  {
    const CasePointer c = make(Size::check);
    if (!agrees(*c, c->results, c->forward, c->define_forward) ||
        !agrees(*c, c->gradients, c->backward, c->define_backward))
      return false;
  }
  const CasePointer c = make(size);
  std::printf("%-5s %-5s %-19s %-17s", name(isa()), c->dtype() == DType::f32 ? "f32" : "bf16",
              c->name.c_str(), c->shape.c_str());
  for (int pass = 0; pass < 2; ++pass) {
    const std::vector<Operand> to = outputs(*c, pass ? c->gradients : c->results);
    const double ns = 1e9 * median_seconds(rounds, [&] { (pass ? c->backward : c->forward)(to); });
    const double limit =
        std::min(peaks.instructions / c->instructions[pass], peaks.bytes / c->bytes[pass]);
    std::printf("  %9.3f %7.3f %4.0f%%", ns / 1e6, c->elements / ns,
                100 * c->elements / ns / limit);
    if (c->products) std::printf(" %6.1f GFLOP/s", 2 * c->instructions[pass] * c->elements / ns);
  }
  std::printf("\n");
  std::fflush(stdout);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--quick")) quick = true;
    else wanted.push_back(argv[i]);
  }
  std::vector<std::pair<std::string, Maker>> makers;
  for (DType dtype : {DType::f32, DType::bf16}) {
    makers.emplace_back("scan", [=](Size size) {
      return size == Size::check   ? scan_case(dtype, 70, 70, 5)
             : size == Size::quick ? scan_case(dtype, 384, 512, 16)
                                   : scan_case(dtype, 1536, 2048, 16);
    });
    // SSD (Mamba-2), the gated delta rule, and gated linear attention.
    const MatrixShape shapes[] = {{"ssd", false, false, 2048, 24, 1, 128, 64},
                                  {"delta rule", true, false, 2048, 8, 4, 128, 128},
                                  {"key decay", false, true, 2048, 8, 8, 64, 128},
                                  {"delta, key decay", true, true, 2048, 8, 8, 128, 128}};
    for (const MatrixShape& full : shapes)
      makers.emplace_back("matrix", [=](Size size) {
        MatrixShape m = full;
        if (size == Size::quick) m.length = 512, m.heads /= 4, m.groups = ceil_div(m.groups, 4);
        if (size == Size::check) m.length = 130, m.heads = 4, m.groups = 2, m.keys = m.values = 33;
        return matrix_case(dtype, m);
      });
    for (bool by_time : {false, true}) {
      makers.emplace_back("recurrence", [=](Size size) {
        return size == Size::check   ? recurrence_case(dtype, 2, 70, 70, by_time)
               : size == Size::quick ? recurrence_case(dtype, 1, 1024, 1024, by_time)
                                     : recurrence_case(dtype, 4, 1024, 4096, by_time);
      });
      makers.emplace_back("conv", [=](Size size) {
        return size == Size::check   ? conv_case(dtype, 70, 70, 4, by_time)
               : size == Size::quick ? conv_case(dtype, 768, 1024, 4, by_time)
                                     : conv_case(dtype, 1536, 2048, 4, by_time);
      });
    }
  }
  std::printf("%d threads, %s\n", num_threads(), thread_runtime());
  for (Isa level : isa_available()) {
    set_isa(level);
    const Peaks peaks = measure_peaks();
    std::printf("%s: peak %.1f multiply-adds/ns, %.1f bytes/ns\n", name(isa()), peaks.instructions,
                peaks.bytes);
    std::printf(
        "level dtype kernel              shape              forward ms elem/ns limit  backward"
        " ms elem/ns limit\n");
    for (const auto& [key, make] : makers)
      if (wanted.empty() || std::find(wanted.begin(), wanted.end(), key) != wanted.end())
        if (!measure(make, quick ? 1 : 5, peaks, quick ? Size::quick : Size::full)) return 1;
  }
  return 0;
}
