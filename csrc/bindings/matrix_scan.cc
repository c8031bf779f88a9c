// SPDX-License-Identifier: Apache-2.0
// The entries of matrix_scan.h. Everything that could make a kernel read or write out of bounds is
// refused here, before anything is written.
#include "scan/matrix_scan.h"

#include "bindings/scan_arguments.h"
#include "scan/matrix_scan_cuda.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace scan;

// Of keys, and of values: a kernel's scratch memory grows with their product.
constexpr int64_t kMostKeys = 1024;

// What the sequence and the token share: their sizes.
template <class Problem>
struct Matrices : Arguments {
  Problem p;

  explicit Matrices(const char* op) : Arguments(op, false, true) {}

  // q: (..., g, n), v: (..., h, p), both of `rank` dimensions; a per head has one less than v, or of a
  // token one dimension where it is constant.
  void set_sizes(const TensorView& q, const TensorView& v, const Optional& a, int rank) {
    set_dtype(v, "v", rank, false);
    expect(q, op(), "q", {q.dtype}, rank, on());
    p.batch = v.shape[0], p.heads = v.shape[rank - 2], p.values = v.shape[rank - 1];
    p.groups = q.shape[rank - 2], p.keys = q.shape[rank - 1];
    check_size("q", q, p.keys, "keys");
    check_size("v", v, p.values, "values");
    if (p.groups < 1 || p.heads % p.groups)
      refuse("q has " + std::to_string(p.groups) + " groups but v has " + std::to_string(p.heads) +
             " heads, which are not a multiple of " + std::to_string(p.groups));
    if (!a) return;
    const int least = rank == 3 ? 1 : rank - 1;
    if (a->rank < least || a->rank > rank)
      refuse("a has shape " + shape_text(*a) + ", expected " + std::to_string(least) +
             (rank == 3 ? " to " : " or ") + std::to_string(rank) + " dimensions");
    p.key_decay = a->rank == rank;
  }

  bool cuda() const { return runs_cuda(on(), dtype() != DType::f64, op(), "float64"); }
  // Integers whose contents a kernel on a device is the first to see.
  cuda::Integers integers(const Optional& view, const char* name) const {
    if (!view) return {};
    expect(*view, op(), name, {DType::i32, DType::i64}, 1, on());
    return {view->data, view->dtype == DType::i64, view->strides[0]};
  }

 private:
  void check_size(const char* name, const TensorView& view, int64_t size, const char* what) const {
    if (size < 1 || size > kMostKeys)
      refuse(std::string(name) + " has shape " + shape_text(view) + ", expected 1 to " +
             std::to_string(kMostKeys) + " " + what);
  }
};

// The arrays that both passes read, in the order of the entries.
struct MatrixInputs {
  const TensorView &q, &k, &v;
  const Optional &a, &w, &d, &initial, &cu_seqlens;
  bool delta, reverse;
  double scale;
};

struct MatrixArguments : Matrices<MatrixScan> {
  cuda::Packed packed;
  Shape like_q, like_v, like_a, like_w, like_d, like_state;

  MatrixArguments(const char* op, const MatrixInputs& in) : Matrices(op) {
    set_sizes(in.q, in.v, in.a, 4);
    p.length = in.v.shape[1];
    p.delta = in.delta, p.reverse = in.reverse, p.scale = in.scale;
    packed.begin = integers(in.cu_seqlens, "cu_seqlens");
    if (on().is_cuda() && in.cu_seqlens) {
      if (p.batch != 1 || in.cu_seqlens->shape[0] < 1)
        refuse("cu_seqlens need a batch of 1, which is " + std::to_string(p.batch) +
               ", and at least one boundary");
      packed.sequences = in.cu_seqlens->shape[0] - 1;
    } else {
      p.begin = boundaries(in.cu_seqlens, p.batch, p.length);
      packed.sequences = p.sequences();
    }
    like_q = {p.batch, p.length, p.groups, p.keys};
    like_v = {p.batch, p.length, p.heads, p.values};
    like_w = {p.batch, p.length, p.heads};
    like_a = like_w;
    if (p.key_decay) like_a.push_back(p.keys);
    like_d = {p.heads, p.values};
    like_state = {packed.sequences, p.heads, p.keys, p.values};
    p.q = input(in.q, "q", {dtype()}, like_q);
    p.k = input(in.k, "k", {dtype()}, like_q);
    p.v = input(in.v, "v", {dtype()}, like_v);
    p.a = input(in.a, "a", {wide()}, like_a);
    p.w = input(in.w, "w", {wide()}, like_w);
    p.d = input(in.d, "d", {wide()}, like_d);
    p.initial = input(in.initial, "initial_state", {wide()}, like_state);
  }

  // Of out and its gradient.
  std::vector<DType> either() const {
    if (dtype() == wide()) return {dtype()};
    return {dtype(), wide()};
  }
  Shape stored_shape() const {
    return {stored_matrices(p.batch, p.length, packed.begin.data, packed.sequences), p.heads,
            p.keys, p.values};
  }
  void check_stored(const Optional& stored) const {
    if (!stored) return;
    if (dtype() == DType::f64) refuse("stored does not go with float64");
    if (!is_contiguous(*stored)) refuse("stored is not contiguous");
  }
};

void py_matrix_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                       const Optional& a, const Optional& w, const Optional& d,
                       const Optional& initial, const Optional& cu_seqlens, bool delta,
                       bool reverse, double scale, const TensorView& out, const Optional& last,
                       const Optional& stored, const Optional& scratch, uintptr_t stream) {
  MatrixArguments s("matrix_scan", {q, k, v, a, w, d, initial, cu_seqlens, delta, reverse, scale});
  const Operand to = s.output(out, "out", s.either(), s.like_v);
  const Operand state = s.output(last, "last_state", {s.wide()}, s.like_state);
  const Operand chunks = s.output(stored, "stored", {DType::f32}, s.stored_shape());
  s.check_stored(stored);
  s.writes.finish();
  auto* states = static_cast<float*>(chunks.data);
  if (!s.cuda()) return matrix_scan_forward(s.p, to, state, states);
  const int64_t bytes = cuda::matrix_forward_scratch(s.p, s.packed, stored.has_value());
  cuda::matrix_forward(stream_of(s.on(), stream), s.p, s.packed, to, state, states,
                       scratch_of(scratch, s.op(), bytes, s.on()));
}

void py_matrix_backward(const Optional& d_out, const Optional& d_last, const Optional& stored,
                        const TensorView& q, const TensorView& k, const TensorView& v,
                        const Optional& a, const Optional& w, const Optional& d,
                        const Optional& initial, const Optional& cu_seqlens, bool delta,
                        bool reverse, double scale, const Optional& dq, const Optional& dk,
                        const Optional& dv, const Optional& da, const Optional& dw,
                        const Optional& dd, const Optional& dinitial, const Optional& scratch,
                        uintptr_t stream) {
  MatrixArguments s("matrix_scan.backward",
                    {q, k, v, a, w, d, initial, cu_seqlens, delta, reverse, scale});
  MatrixScanGradients g;
  g.d_out = s.input(d_out, "d_out", s.either(), s.like_v);
  g.d_last = s.input(d_last, "d_last", {s.wide()}, s.like_state);
  g.stored =
      static_cast<const float*>(s.input(stored, "stored", {DType::f32}, s.stored_shape()).data);
  s.check_stored(stored);
  if (!stored && s.dtype() != DType::f64)
    s.refuse("the states that the forward pass stored are missing");
  s.needs(da, "da", a.has_value(), "a");
  s.needs(dw, "dw", w.has_value(), "w");
  s.needs(dd, "dd", d.has_value(), "d");
  s.needs(dinitial, "dinitial", initial.has_value(), "initial_state");
  g.dq = s.output(dq, "dq", {s.dtype()}, s.like_q);
  g.dk = s.output(dk, "dk", {s.dtype()}, s.like_q);
  g.dv = s.output(dv, "dv", {s.dtype()}, s.like_v);
  g.da = s.output(da, "da", {s.wide()}, s.like_a);
  g.dw = s.output(dw, "dw", {s.wide()}, s.like_w);
  g.dd = s.output(dd, "dd", {s.wide()}, s.like_d);
  g.dinitial = s.output(dinitial, "dinitial", {s.wide()}, s.like_state);
  s.writes.finish();
  if (!s.cuda()) return matrix_scan_backward(s.p, g);
  const int64_t bytes = cuda::matrix_backward_scratch(s.p, s.packed);
  cuda::matrix_backward(stream_of(s.on(), stream), s.p, s.packed, g,
                        scratch_of(scratch, s.op(), bytes, s.on()));
}

// Bytes of scratch memory of a pass on a device; `sequences`: of packed ones, or -1.
int64_t py_matrix_scratch(int64_t batch, int64_t length, int64_t heads, int64_t groups,
                          int64_t keys, int64_t values, int64_t sequences, bool delta,
                          bool key_decay, bool backward, bool stored) {
  MatrixScan p;
  p.batch = batch, p.length = length, p.heads = heads, p.groups = groups;
  p.keys = keys, p.values = values, p.delta = delta, p.key_decay = key_decay;
  cuda::Packed packed{{}, batch};
  if (sequences >= 0) packed = {{&p}, sequences};  // any address: there are boundaries
  return backward ? cuda::matrix_backward_scratch(p, packed)
                  : cuda::matrix_forward_scratch(p, packed, stored);
}

// One token: q, k (B, G, N), v, out (B, H, P), a (B, H) or (B, H, N), w (B, H), d (H, P).
void py_matrix_update(const TensorView& state, const TensorView& q, const TensorView& k,
                      const TensorView& v, const Optional& a, const Optional& w, const Optional& d,
                      bool delta, double scale, const Optional& rows, const TensorView& out,
                      uintptr_t stream) {
  Matrices<MatrixUpdate> s("matrix_update");
  MatrixUpdate& p = s.p;
  s.set_sizes(q, v, a, 3);
  expect(state, s.op(), "state", {state.dtype}, 4, s.on());
  p.delta = delta, p.scale = scale;
  const cuda::Integers list = s.integers(rows, "state_batch_indices");
  if (!s.on().is_cuda() || !rows)
    p.rows = s.rows(rows, "state_batch_indices", p.batch, state.shape[0], "state");
  else if (rows->shape[0] != p.batch)
    s.refuse("state_batch_indices has shape " + shape_text(*rows) + ", expected (" +
             std::to_string(p.batch) + ",)");
  const Shape like_q = {p.batch, p.groups, p.keys}, like_v = {p.batch, p.heads, p.values};
  const Shape like_w = {p.batch, p.heads};
  const bool constant = a && a->rank == 1;
  Shape like_a = constant ? Shape{p.heads} : like_w;
  if (p.key_decay) like_a.push_back(p.keys);
  p.q = s.input(q, "q", {s.dtype()}, like_q);
  p.k = s.input(k, "k", {s.dtype()}, like_q);
  p.v = s.input(v, "v", {s.dtype()}, like_v);
  p.a = s.input(a, "a", {s.wide()}, like_a);
  if (constant) p.a.stride[1] = p.a.stride[0], p.a.stride[0] = 0;
  p.w = s.input(w, "w", {s.wide()}, like_w);
  p.d = s.input(d, "d", {s.wide()}, {p.heads, p.values});
  p.state = s.output(state, "state", s.own(), {state.shape[0], p.heads, p.keys, p.values});
  p.out = s.output(out, "out", {s.dtype()}, like_v);
  s.writes.finish();
  if (s.cuda()) cuda::matrix_update(stream_of(s.on(), stream), p, list, state.shape[0]);
  else matrix_update(p);
}

}  // namespace

void bind_matrix_scan(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.attr("matrix_chunk") = kMatrixChunk;
  const auto no_scratch = py::arg("scratch") = py::none(), default_stream = py::arg("stream") = 0;
  const auto arg = [](const char* name) { return py::arg(name); };
  m.def("matrix_scan_forward", &py_matrix_forward, arg("q"), arg("k"), arg("v"), arg("a"), arg("w"),
        arg("d"), arg("initial"), arg("cu_seqlens"), arg("delta"), arg("reverse"), arg("scale"),
        arg("out"), arg("last"), arg("stored"), no_scratch, default_stream, release);
  m.def("matrix_scan_backward", &py_matrix_backward, arg("d_out"), arg("d_last"), arg("stored"),
        arg("q"), arg("k"), arg("v"), arg("a"), arg("w"), arg("d"), arg("initial"),
        arg("cu_seqlens"), arg("delta"), arg("reverse"), arg("scale"), arg("dq"), arg("dk"),
        arg("dv"), arg("da"), arg("dw"), arg("dd"), arg("dinitial"), no_scratch, default_stream,
        release);
  m.def("matrix_scan_scratch", &py_matrix_scratch);
  m.def("matrix_update", &py_matrix_update, arg("state"), arg("q"), arg("k"), arg("v"), arg("a"),
        arg("w"), arg("d"), arg("delta"), arg("scale"), arg("rows"), arg("out"), default_stream,
        release);
}

}  // namespace pentad
