// SPDX-License-Identifier: Apache-2.0
// The entries of scans over images. Everything that could make a kernel read or write out of bounds
// is refused here, before anything is written.
#include <algorithm>

#include "bindings/lists.h"
#include "bindings/scan_arguments.h"
#include "scan/scan2d.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace scan;

// Inputs may be expanded: these bound what a kernel allocates.
constexpr int64_t kMostStates = 1 << 16;
constexpr int64_t kMostDirections = 1024;

void check_states(const Arguments& s, const TensorView& a, int64_t states) {
  if (states < 1 || states > kMostStates)
    s.refuse("A has shape " + shape_text(a) + ", expected 1 to " + std::to_string(kMostStates) +
             " states");
}

// --- Cross-scan ------------------------------------------------------------------------------------

struct CrossInputs {
  const TensorView &u, &delta, &a, &b, &c;
  const Optional &d, &delta_bias;
  const TensorView& order;
  bool softplus, delta_by_step, b_by_step, c_by_step;
};

struct CrossArguments : Arguments {
  CrossScan p;
  Shape like_u, like_delta, like_a, like_b, like_d;
  std::vector<int32_t> order;

  CrossArguments(const char* op, const CrossInputs& in) : Arguments(op, false) {
    set_dtype(in.u, "u", 3, false);
    expect(in.a, op, "A", {in.a.dtype}, 3);
    p.batch = in.u.shape[0], p.dim = in.u.shape[1], p.length = in.u.shape[2];
    p.directions = in.a.shape[0], p.states = in.a.shape[2];
    check_states(*this, in.a, p.states);
    if (p.directions > kMostDirections)
      refuse("A has shape " + shape_text(in.a) + ", expected at most " +
             std::to_string(kMostDirections) + " directions");
    p.softplus = in.softplus, p.delta_by_step = in.delta_by_step;
    p.b_by_step = in.b_by_step, p.c_by_step = in.c_by_step;
    set_order(in.order);
    like_u = {p.batch, p.dim, p.length};
    like_delta = {p.batch, p.directions, p.dim, p.length};
    like_a = {p.directions, p.dim, p.states};
    like_b = {p.batch, p.directions, p.states, p.length};
    like_d = {p.directions, p.dim};
    p.u = input(in.u, "u", {dtype()}, like_u);
    p.delta = input(in.delta, "delta", {dtype()}, like_delta);
    p.a = input(in.a, "A", {wide()}, like_a);
    p.b = input(in.b, "B", {dtype()}, like_b);
    p.c = input(in.c, "C", {dtype()}, like_b);
    p.d = input(in.d, "D", {wide()}, like_d);
    p.delta_bias = input(in.delta_bias, "delta_bias", {wide()}, like_d);
  }

  Shape stored_shape() const {
    return {p.batch, p.directions, stored_chunks(1, p.length, false, 1), p.states, p.dim};
  }
  void check_stored(const TensorView& stored) const {
    if (dtype() == DType::f64) refuse("stored does not go with float64");
    if (!is_contiguous(stored)) refuse("stored is not contiguous");
  }

 private:
  // Copied first: the copy is checked and used.
  void set_order(const TensorView& view) {
    expect(view, op(), "order", {DType::i32, DType::i64}, 2);
    lists::expect_shape(view, op(), "order", {p.directions, p.length});
    if (p.length > INT32_MAX) refuse("u has 2^31 places or more");
    TensorView row = view;
    row.rank = 1, row.shape[0] = p.length, row.strides[0] = view.strides[1];
    std::vector<bool> seen(p.length);
    order.reserve(p.directions * p.length);
    for (int64_t k = 0; k < p.directions; ++k) {
      row.data = static_cast<char*>(view.data) + k * view.strides[0] * size_of(view.dtype);
      std::fill(seen.begin(), seen.end(), false);
      for (int64_t place : lists::integers(row, op(), "order")) {
        const bool inside = place >= 0 && place < p.length;
        if (!inside || seen[place])
          refuse("order holds " + std::to_string(place) + (inside ? " twice" : "") + " in row " +
                 std::to_string(k) + ", expected each of 0 to " + std::to_string(p.length - 1) +
                 " once");
        seen[place] = true;
        order.push_back(static_cast<int32_t>(place));
      }
    }
    p.order = order.data();
  }
};

void py_cross_forward(const TensorView& u, const TensorView& delta, const TensorView& a,
                      const TensorView& b, const TensorView& c, const Optional& d,
                      const Optional& delta_bias, const TensorView& order, bool softplus,
                      bool delta_by_step, bool b_by_step, bool c_by_step, const TensorView& out,
                      const Optional& stored) {
  CrossArguments s("scan2d", {u, delta, a, b, c, d, delta_bias, order, softplus, delta_by_step,
                              b_by_step, c_by_step});
  const Operand to = s.output(out, "out", {s.dtype()}, s.like_u);
  const Operand chunks = s.output(stored, "stored", {DType::f32}, s.stored_shape());
  if (stored) s.check_stored(*stored);
  s.writes.finish();
  cross_scan_forward(s.p, to, static_cast<float*>(chunks.data));
}

void py_cross_backward(const TensorView& d_out, const Optional& stored, const TensorView& u,
                       const TensorView& delta, const TensorView& a, const TensorView& b,
                       const TensorView& c, const Optional& d, const Optional& delta_bias,
                       const TensorView& order, bool softplus, bool delta_by_step, bool b_by_step,
                       bool c_by_step, const Optional& du, const Optional& ddelta,
                       const Optional& da, const Optional& db, const Optional& dc,
                       const Optional& dd, const Optional& ddelta_bias) {
  CrossArguments s("scan2d.backward", {u, delta, a, b, c, d, delta_bias, order, softplus,
                                       delta_by_step, b_by_step, c_by_step});
  CrossScanGradients g;
  g.d_out = s.input(d_out, "d_out", {s.dtype()}, s.like_u);
  g.stored =
      static_cast<const float*>(s.input(stored, "stored", {DType::f32}, s.stored_shape()).data);
  if (stored) s.check_stored(*stored);
  else if (s.dtype() != DType::f64) s.refuse("the states that the forward pass stored are missing");
  s.needs(dd, "dD", d.has_value(), "D");
  s.needs(ddelta_bias, "ddelta_bias", delta_bias.has_value(), "delta_bias");
  g.du = s.output(du, "du", {s.dtype()}, s.like_u);
  g.ddelta = s.output(ddelta, "ddelta", {s.dtype()}, s.like_delta);
  g.da = s.output(da, "dA", {s.wide()}, s.like_a);
  g.db = s.output(db, "dB", {s.wide()}, s.like_b);
  g.dc = s.output(dc, "dC", {s.wide()}, s.like_b);
  g.dd = s.output(dd, "dD", {s.wide()}, s.like_d);
  g.ddelta_bias = s.output(ddelta_bias, "ddelta_bias", {s.wide()}, s.like_d);
  s.writes.finish();
  cross_scan_backward(s.p, g);
}

// --- Along both axes -------------------------------------------------------------------------------

struct WavefrontInputs {
  const TensorView &u, &delta, &a, &b, &c;
  const Optional& d;
  int64_t width;
};

struct WavefrontArguments : Arguments {
  Wavefront p;
  Shape like_u, like_delta, like_a, like_b, like_c;

  WavefrontArguments(const char* op, const WavefrontInputs& in) : Arguments(op, false) {
    set_dtype(in.u, "u", 3, false);
    expect(in.a, op, "A", {in.a.dtype}, 3);
    const int64_t places = in.u.shape[2];
    p.batch = in.u.shape[0], p.dim = in.u.shape[1], p.states = in.a.shape[2];
    check_states(*this, in.a, p.states);
    if (in.width < 0 || (in.width ? places % in.width : places))
      refuse("width is " + std::to_string(in.width) + ", but there are " + std::to_string(places) +
             " places");
    p.width = in.width, p.height = in.width ? places / in.width : 0;
    like_u = {p.batch, p.dim, places};
    like_delta = {p.batch, 2, p.dim, places};
    like_a = {2, p.dim, p.states};
    like_b = {p.batch, 2, p.states, places};
    like_c = {p.batch, p.states, places};
    p.u = input(in.u, "u", {dtype()}, like_u);
    p.delta = input(in.delta, "delta", {dtype()}, like_delta);
    p.a = input(in.a, "A", {wide()}, like_a);
    p.b = input(in.b, "B", {dtype()}, like_b);
    p.c = input(in.c, "C", {dtype()}, like_c);
    p.d = input(in.d, "D", {wide()}, {p.dim});
  }

  Shape stored_shape() const { return {p.batch, stored_bands(p.height), p.width, p.states, p.dim}; }
  void check_stored(const TensorView& stored) const {
    if (dtype() == DType::f64) refuse("stored does not go with float64");
    if (!is_contiguous(stored)) refuse("stored is not contiguous");
  }
};

void py_wavefront_forward(const TensorView& u, const TensorView& delta, const TensorView& a,
                          const TensorView& b, const TensorView& c, const Optional& d,
                          int64_t width, const TensorView& out, const Optional& stored) {
  WavefrontArguments s("scan2d_wavefront", {u, delta, a, b, c, d, width});
  const Operand to = s.output(out, "out", {s.dtype()}, s.like_u);
  const Operand bands = s.output(stored, "stored", {DType::f32}, s.stored_shape());
  if (stored) s.check_stored(*stored);
  s.writes.finish();
  wavefront_forward(s.p, to, static_cast<float*>(bands.data));
}

void py_wavefront_backward(const TensorView& d_out, const Optional& stored, const TensorView& u,
                           const TensorView& delta, const TensorView& a, const TensorView& b,
                           const TensorView& c, const Optional& d, int64_t width,
                           const Optional& du, const Optional& ddelta, const Optional& da,
                           const Optional& db, const Optional& dc, const Optional& dd) {
  WavefrontArguments s("scan2d_wavefront.backward", {u, delta, a, b, c, d, width});
  WavefrontGradients g;
  g.d_out = s.input(d_out, "d_out", {s.dtype()}, s.like_u);
  g.stored =
      static_cast<const float*>(s.input(stored, "stored", {DType::f32}, s.stored_shape()).data);
  if (stored) s.check_stored(*stored);
  else if (s.dtype() != DType::f64) s.refuse("the states that the forward pass stored are missing");
  s.needs(dd, "dD", d.has_value(), "D");
  g.du = s.output(du, "du", {s.dtype()}, s.like_u);
  g.ddelta = s.output(ddelta, "ddelta", {s.dtype()}, s.like_delta);
  g.da = s.output(da, "dA", {s.wide()}, s.like_a);
  g.db = s.output(db, "dB", {s.wide()}, s.like_b);
  g.dc = s.output(dc, "dC", {s.wide()}, s.like_c);
  g.dd = s.output(dd, "dD", {s.wide()}, {s.p.dim});
  s.writes.finish();
  wavefront_backward(s.p, g);
}

}  // namespace

void bind_scan2d(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cross_scan_forward", &py_cross_forward, release);
  m.def("cross_scan_backward", &py_cross_backward, release);
  m.attr("wavefront_band") = kBand;
  m.def("wavefront_forward", &py_wavefront_forward, release);
  m.def("wavefront_backward", &py_wavefront_backward, release);
}

}  // namespace pentad
