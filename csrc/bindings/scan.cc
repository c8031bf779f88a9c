// SPDX-License-Identifier: Apache-2.0
// The entries of linear recurrences. Everything that could make a kernel read or write out of
// bounds is refused here, before anything is written.
#include <algorithm>

#include "bindings/lists.h"
#include "bindings/scan_arguments.h"
#include "scan/scan_cuda.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace scan;

// --- Lists ------------------------------------------------------------------------------------------

// Integers as a kernel on a device reads them, without anybody's look at them before.
cuda::Indices indices_of(const Arguments& s, const Optional& view, const char* name) {
  if (!view) return {};
  expect(*view, s.op(), name, {DType::i32, DType::i64}, 1, s.on());
  return {view->data, view->dtype, view->strides[0], view->shape[0]};
}

// Boundaries of packed sequences; checked where the CPU can read them.
struct Boundaries {
  cuda::Indices indices;
  std::vector<int64_t> list;
  int64_t sequences;

  Boundaries(const Arguments& s, const Optional& view, int64_t batch, int64_t length)
      : indices(indices_of(s, view, "cu_seqlens")), sequences(batch) {
    if (!view) return;
    if (!s.on().is_cuda()) list = s.boundaries(view, batch, length);
    else if (batch != 1)
      s.refuse("cu_seqlens need a batch of 1, but the batch is " + std::to_string(batch));
    else if (indices.count < 1) s.refuse("cu_seqlens are empty");
    sequences = indices.count - 1;
  }
};

// Rows of a cache, or other numbers of the sequences of a batch; likewise.
struct CacheRows {
  cuda::Indices indices;
  std::vector<int64_t> list;

  CacheRows(const Arguments& s, const Optional& view, const char* name, int64_t batch,
            int64_t state_rows, const char* state_name)
      : indices(indices_of(s, view, name)) {
    if (!view || !s.on().is_cuda()) list = s.rows(view, name, batch, state_rows, state_name);
    else lists::expect_shape(*view, s.op(), name, {batch});
  }
};

bool on_cuda(const Arguments& s) {
  return runs_cuda(s.on(), s.dtype() != DType::f64, s.op(), "float64");
}

// --- Selective scan --------------------------------------------------------------------------------

// With an output like u, which is memory that exists, this bounds what a kernel allocates, though
// the inputs may be expanded.
constexpr int64_t kMostStates = 1 << 16;

// The arrays that both passes read, in the order of the entries.
struct ScanInputs {
  const TensorView &u, &delta, &a, &b, &c;
  const Optional &d, &z, &delta_bias, &initial, &cu_seqlens;
  bool softplus, reverse, complex;
};

struct ScanArguments : Arguments {
  SelectiveScan p;
  cuda::Indices begin;
  int64_t sequences;
  bool packed;
  Shape channels, like_u, like_a, like_b, like_c, like_state;

  ScanArguments(const char* op, const ScanInputs& in) : Arguments(op, in.complex, true) {
    set_dtype(in.u, "u", 3, false);
    p.batch = in.u.shape[0], p.dim = in.u.shape[1], p.length = in.u.shape[2];
    p.complex = in.complex, p.softplus = in.softplus, p.reverse = in.reverse;
    const int parts = in.complex ? 1 : 0;
    expect(in.a, op, "A", {in.a.dtype}, 2 + parts, on());
    p.states = in.a.shape[1];
    if (p.states < 1 || p.states > kMostStates)
      refuse("A has shape " + shape_text(in.a) + ", expected 1 to " + std::to_string(kMostStates) +
             " states");
    p.constant_b = in.b.rank == 2 + parts;
    p.constant_c = in.c.rank == 2 + parts;
    set_groups(in.b, "B", p.constant_b);
    set_groups(in.c, "C", p.constant_c);
    const Boundaries boundaries(*this, in.cu_seqlens, p.batch, p.length);
    begin = boundaries.indices, p.begin = boundaries.list, sequences = boundaries.sequences;
    packed = in.cu_seqlens.has_value();

    channels = {p.dim};
    like_u = {p.batch, p.dim, p.length};
    like_a = {p.dim, p.states};
    like_b = p.constant_b ? like_a : Shape{p.batch, p.groups, p.states, p.length};
    like_c = p.constant_c ? like_a : Shape{p.batch, p.groups, p.states, p.length};
    like_state = {sequences, p.dim, p.states};
    p.u = input(in.u, "u", {dtype()}, like_u);
    p.delta = input(in.delta, "delta", {dtype()}, like_u);
    p.a = input(in.a, "A", {wide()}, like_a, true);
    p.b = input(in.b, "B", {p.constant_b ? wide() : dtype()}, like_b, true);
    p.c = input(in.c, "C", {p.constant_c ? wide() : dtype()}, like_c, true);
    p.d = input(in.d, "D", {wide()}, channels);
    p.z = input(in.z, "z", {dtype()}, like_u);
    p.delta_bias = input(in.delta_bias, "delta_bias", {wide()}, channels);
    p.initial = input(in.initial, "initial_state", {wide()}, like_state, true);
  }

  Shape stored_shape() const {
    return {stored_chunks(p.batch, p.length, packed, sequences), p.states, p.parts(), p.dim};
  }
  void check_stored(const TensorView& stored) const {
    if (dtype() == DType::f64) refuse("stored does not go with float64");
    if (!is_contiguous(stored)) refuse("stored is not contiguous");
  }

 private:
  void set_groups(const TensorView& x, const char* name, bool constant) {
    if (constant) return;
    const int rank = p.complex ? 5 : 4;
    if (x.rank != rank)
      refuse(std::string(name) + " has shape " + shape_text(x) + ", expected " +
             std::to_string(rank - 2) + " or " + std::to_string(rank) + " dimensions");
    // After B's the groups of C must be the same, which its shape shows.
    if (name[0] == 'C' && !p.constant_b) return;
    p.groups = x.shape[1];
    if (p.groups < 1 || p.dim % p.groups)
      refuse(std::string(name) + " has " + std::to_string(p.groups) + " groups but D = " +
             std::to_string(p.dim) + " channels are not a multiple of " + std::to_string(p.groups));
  }
};

void py_scan_forward(const TensorView& u, const TensorView& delta, const TensorView& a,
                     const TensorView& b, const TensorView& c, const Optional& d, const Optional& z,
                     const Optional& delta_bias, const Optional& initial,
                     const Optional& cu_seqlens, bool softplus, bool reverse, bool complex,
                     const TensorView& out, const Optional& last, const Optional& stored,
                     const Optional& scratch, uintptr_t stream) {
  ScanArguments arguments("selective_scan", {u, delta, a, b, c, d, z, delta_bias, initial,
                                             cu_seqlens, softplus, reverse, complex});
  ScanArguments& s = arguments;
  const Operand to = s.output(out, "out", {s.dtype()}, s.like_u);
  const Operand state = s.output(last, "last_state", {s.wide()}, s.like_state, true);
  const Operand chunks = s.output(stored, "stored", {DType::f32}, s.stored_shape());
  if (stored) s.check_stored(*stored);
  s.writes.finish();
  auto* chunk_states = static_cast<float*>(chunks.data);
  if (!on_cuda(s)) return selective_scan_forward(s.p, to, state, chunk_states);
  const SelectiveScan& p = s.p;
  const int64_t bytes = cuda::selective_scan_forward_scratch(p.batch, p.dim, p.length, p.states,
                                                             complex, s.sequences, s.packed);
  cuda::selective_scan_forward(stream_of(s.on(), stream), p, s.begin, to, state, chunk_states,
                               scratch_of(scratch, s.op(), bytes, s.on()));
}

void py_scan_backward(const Optional& d_out, const Optional& d_last, const Optional& stored,
                      const TensorView& u, const TensorView& delta, const TensorView& a,
                      const TensorView& b, const TensorView& c, const Optional& d,
                      const Optional& z, const Optional& delta_bias, const Optional& initial,
                      const Optional& cu_seqlens, bool softplus, bool reverse, bool complex,
                      const TensorView& du, const Optional& ddelta, const Optional& da,
                      const Optional& db, const Optional& dc, const Optional& dd,
                      const Optional& dz, const Optional& ddelta_bias, const Optional& dinitial,
                      const Optional& scratch, uintptr_t stream) {
  ScanArguments arguments("selective_scan.backward", {u, delta, a, b, c, d, z, delta_bias, initial,
                                                      cu_seqlens, softplus, reverse, complex});
  ScanArguments& s = arguments;
  SelectiveScanGradients g;
  g.d_out = s.input(d_out, "d_out", {s.dtype()}, s.like_u);
  g.d_last = s.input(d_last, "d_last", {s.wide()}, s.like_state, true);
  g.stored =
      static_cast<const float*>(s.input(stored, "stored", {DType::f32}, s.stored_shape()).data);
  if (stored) s.check_stored(*stored);
  else if (s.dtype() != DType::f64) s.refuse("the states that the forward pass stored are missing");
  s.needs(dd, "dD", d.has_value(), "D");
  s.needs(dz, "dz", z.has_value(), "z");
  s.needs(ddelta_bias, "ddelta_bias", delta_bias.has_value(), "delta_bias");
  s.needs(dinitial, "dinitial", initial.has_value(), "initial_state");
  g.du = s.output(du, "du", {s.dtype()}, s.like_u);
  g.ddelta = s.output(ddelta, "ddelta", {s.dtype()}, s.like_u);
  g.da = s.output(da, "dA", {s.wide()}, s.like_a, true);
  g.db = s.output(db, "dB", {s.wide()}, s.like_b, true);
  g.dc = s.output(dc, "dC", {s.wide()}, s.like_c, true);
  g.dd = s.output(dd, "dD", {s.wide()}, s.channels);
  g.dz = s.output(dz, "dz", {s.dtype()}, s.like_u);
  g.ddelta_bias = s.output(ddelta_bias, "ddelta_bias", {s.wide()}, s.channels);
  g.dinitial = s.output(dinitial, "dinitial", {s.wide()}, s.like_state, true);
  s.writes.finish();
  if (!on_cuda(s)) return selective_scan_backward(s.p, g);
  const SelectiveScan& p = s.p;
  const int64_t bytes = cuda::selective_scan_backward_scratch(
      p.batch, p.dim, p.length, p.states, p.groups, complex, s.sequences, s.packed);
  cuda::selective_scan_backward(stream_of(s.on(), stream), p, s.begin, g,
                                scratch_of(scratch, s.op(), bytes, s.on()));
}

// The view with one more dimension, of size 1, before `position`.
TensorView expanded(const TensorView& view, int position) {
  TensorView result = view;
  if (view.rank == TensorView::kMaxRank) return result;  // refused for its rank all the same
  std::copy_backward(view.shape + position, view.shape + view.rank, result.shape + view.rank + 1);
  std::copy_backward(view.strides + position, view.strides + view.rank,
                     result.strides + view.rank + 1);
  result.shape[position] = result.strides[position] = 1;
  ++result.rank;
  return result;
}

// With heads, or without them: state (S, P, N), x, dt, z, out (B, P), A (P, N), B, C (B, N), D and
// dt_bias (P,), which is one head.
void py_state_update(const TensorView& state, const TensorView& x, const TensorView& dt,
                     const TensorView& a, const TensorView& b, const TensorView& c,
                     const Optional& d, const Optional& z, const Optional& dt_bias, bool softplus,
                     const Optional& rows, const TensorView& out, uintptr_t stream) {
  if (state.rank == 3) {
    const auto head = [](const char* name, const TensorView& view, int rank, int position) {
      expect(view, "selective_state_update", name, {view.dtype}, rank, device_of(view));
      return expanded(view, position);
    };
    const auto optional_head = [&](const char* name, const Optional& view, int rank,
                                   int position) -> Optional {
      return view ? Optional(head(name, *view, rank, position)) : std::nullopt;
    };
    // B and C may have their one group.
    const auto group = [&](const char* name, const TensorView& view) {
      return view.rank == 3 ? TensorView(view) : TensorView(head(name, view, 2, 1));
    };
    return py_state_update(
        expanded(state, 1), head("x", x, 2, 1), head("dt", dt, 2, 1), head("A", a, 2, 0),
        group("B", b), group("C", c), optional_head("D", d, 1, 0), optional_head("z", z, 2, 1),
        optional_head("dt_bias", dt_bias, 1, 0), softplus, rows, head("out", out, 2, 1), stream);
  }
  Arguments s("selective_state_update", false, true);
  s.set_dtype(x, "x", 3, false);
  expect(state, s.op(), "state", {state.dtype}, 4, s.on());
  expect(b, s.op(), "B", {b.dtype}, 3, s.on());
  StateUpdate p;
  p.batch = x.shape[0], p.heads = x.shape[1], p.head_dim = x.shape[2];
  p.states = state.shape[3], p.groups = b.shape[1], p.softplus = softplus;
  if (p.states < 1)
    s.refuse("state has shape " + shape_text(state) + ", expected 1 or more states");
  if (p.groups < 1 || p.heads % p.groups)
    s.refuse("B has " + std::to_string(p.groups) + " groups but " + std::to_string(p.heads) +
             " heads are not a multiple of " + std::to_string(p.groups));
  const CacheRows cache(s, rows, "state_batch_indices", p.batch, state.shape[0], "state");
  p.rows = cache.list;
  const Shape like_x = {p.batch, p.heads, p.head_dim}, like_d = {p.heads, p.head_dim};
  const Shape like_b = {p.batch, p.groups, p.states};
  p.x = s.input(x, "x", {s.dtype()}, like_x);
  p.dt = s.input(dt, "dt", {s.dtype()}, like_x);
  p.a = s.input(a, "A", {s.wide()}, {p.heads, p.head_dim, p.states});
  p.b = s.input(b, "B", {s.dtype()}, like_b);
  p.c = s.input(c, "C", {s.dtype()}, like_b);
  p.d = s.input(d, "D", {s.wide()}, like_d);
  p.z = s.input(z, "z", {s.dtype()}, like_x);
  p.dt_bias = s.input(dt_bias, "dt_bias", {s.wide()}, like_d);
  p.state = s.output(state, "state", s.own(), {state.shape[0], p.heads, p.head_dim, p.states});
  p.out = s.output(out, "out", {s.dtype()}, like_x);
  s.writes.finish();
  if (!on_cuda(s)) return state_update(p);
  cuda::state_update(stream_of(s.on(), stream), p, cache.indices, state.shape[0]);
}

// --- Projections of a step -------------------------------------------------------------------------

void py_few_rows_linear(const TensorView& x, const TensorView& weight, const Optional& bias,
                        const TensorView& out, uintptr_t stream) {
  Arguments s("few_rows_linear", false, true);
  s.set_dtype(x, "x", 2, false);
  expect(weight, s.op(), "weight", {weight.dtype}, 2, s.on());
  FewRowsLinear p;
  p.rows = x.shape[0], p.inputs = x.shape[1], p.outputs = weight.shape[0];
  if (p.rows < 1 || p.rows > kMostRows)
    s.refuse("x has shape " + shape_text(x) + ", expected 1 to " + std::to_string(kMostRows) +
             " rows");
  p.x = s.input(x, "x", {s.dtype()}, {p.rows, p.inputs});
  p.weight = s.input(weight, "weight", {s.dtype()}, {p.outputs, p.inputs});
  if (p.inputs > 1 && p.weight.stride[1] != 1)
    s.refuse("weight has stride " + std::to_string(p.weight.stride[1]) +
             " along its rows, expected 1");
  p.bias = s.input(bias, "bias", {s.dtype()}, {p.outputs});
  const Operand to = s.output(out, "out", {s.dtype()}, {p.rows, p.outputs});
  s.writes.finish();
  if (!on_cuda(s)) return few_rows_linear(p, to);
  cuda::few_rows_linear(stream_of(s.on(), stream), p, to);
}

// --- Elementwise recurrence ------------------------------------------------------------------------

struct RecurrenceArguments : Arguments {
  Recurrence p;
  Shape all, without_time;

  // `like` has the problem's shape and dtype.
  RecurrenceArguments(const char* op, const TensorView& like, const char* name, const TensorView& a,
                      const Optional& h0, bool log_space, bool reverse, bool complex)
      : Arguments(op, complex, true) {
    set_dtype(like, name, 3, true);
    p.outer = like.shape[0], p.inner = like.shape[1], p.length = like.shape[2];
    p.complex = complex, p.log_space = log_space, p.reverse = reverse;
    all = {p.outer, p.inner, p.length};
    without_time = {p.outer, p.inner};
    p.a = input(a, "a", {dtype()}, all, true);
    p.x.dtype = dtype();
    p.h0 = input(h0, "h0", {dtype()}, without_time, true);
  }
};

void py_recurrence_forward(const TensorView& a, const TensorView& x, const Optional& h0,
                           const TensorView& h, bool log_space, bool reverse, bool complex,
                           uintptr_t stream) {
  RecurrenceArguments s("linear_recurrence", x, "x", a, h0, log_space, reverse, complex);
  s.p.x = s.input(x, "x", {s.dtype()}, s.all, true);
  const Operand to = s.output(h, "h", {s.dtype()}, s.all, true);
  s.writes.finish();
  if (!on_cuda(s)) return recurrence_forward(s.p, to);
  cuda::recurrence_forward(stream_of(s.on(), stream), s.p, to);
}

void py_recurrence_backward(const TensorView& a, const Optional& h0, const TensorView& h,
                            const TensorView& dh, const Optional& da, const Optional& dx,
                            const Optional& dh0, bool log_space, bool reverse, bool complex,
                            uintptr_t stream) {
  RecurrenceArguments s("linear_recurrence.backward", h, "h", a, h0, log_space, reverse, complex);
  const Recurrence& p = s.p;
  RecurrenceGradients g;
  g.h = s.input(h, "h", {s.dtype()}, s.all, true);
  g.dh = s.input(dh, "dh", {s.dtype()}, s.all, true);
  s.needs(dh0, "dh0", h0.has_value(), "h0");
  const std::vector<DType> either = {s.dtype(), s.wide()};
  g.sum_da = da && p.length != 1 && da->rank > 2 && da->shape[2] == 1;
  g.da = s.output(da, "da", either, g.sum_da ? Shape{p.outer, p.inner, 1} : s.all, true);
  g.dx = s.output(dx, "dx", either, s.all, true);
  g.dh0 = s.output(dh0, "dh0", either, s.without_time, true);
  s.writes.finish();
  if (!on_cuda(s)) return recurrence_backward(p, g);
  cuda::recurrence_backward(stream_of(s.on(), stream), p, g);
}

// --- Causal convolution ----------------------------------------------------------------------------

struct ConvArguments : Arguments {
  CausalConv p;
  cuda::Indices begin;
  Shape like_x, like_weight, like_bias, like_initial;

  ConvArguments(const char* op, const TensorView& x, const TensorView& weight, const Optional& bias,
                const Optional& initial, const Optional& seq_idx, const Optional& cu_seqlens,
                bool silu)
      : Arguments(op, false, true) {
    set_dtype(x, "x", 3, false);
    p.batch = x.shape[0], p.dim = x.shape[1], p.length = x.shape[2], p.silu = silu;
    expect(weight, op, "weight", {weight.dtype}, 2, on());
    p.width = weight.shape[1];
    if (p.width < 1 || p.width > kMaxWidth)
      refuse("weight has shape " + shape_text(weight) + ", expected 1 to " +
             std::to_string(kMaxWidth) + " columns");
    const Boundaries boundaries(*this, cu_seqlens, p.batch, p.length);
    begin = boundaries.indices, p.begin = boundaries.list;
    like_x = {p.batch, p.dim, p.length};
    like_weight = {p.dim, p.width};
    like_bias = {p.dim};
    like_initial = {boundaries.sequences, p.dim, p.width - 1};
    p.x = input(x, "x", {dtype()}, like_x);
    p.weight = input(weight, "weight", own(), like_weight);
    p.bias = input(bias, "bias", own(), like_bias);
    p.initial = input(initial, "initial_states", {dtype()}, like_initial);
    if (!seq_idx) return;
    if (cu_seqlens || initial) refuse("seq_idx goes with neither cu_seqlens nor initial_states");
    const Operand index = input(seq_idx, "seq_idx", {DType::i32}, {p.batch, p.length});
    p.seq_idx = static_cast<const int32_t*>(index.data);
    std::copy_n(index.stride, 2, p.seq_idx_stride);
  }

  void without_seq_idx(const Optional& view, const char* name) const {
    if (view && p.seq_idx) refuse(std::string(name) + " does not go with seq_idx");
  }
};

void py_conv_forward(const TensorView& x, const TensorView& weight, const Optional& bias,
                     const Optional& initial, const Optional& seq_idx, const Optional& cu_seqlens,
                     bool silu, const TensorView& out, const Optional& final, uintptr_t stream) {
  ConvArguments s("causal_conv1d", x, weight, bias, initial, seq_idx, cu_seqlens, silu);
  s.without_seq_idx(final, "final_states");
  const Operand to = s.output(out, "out", {s.dtype()}, s.like_x);
  const Operand state = s.output(final, "final_states", {s.dtype()}, s.like_initial);
  s.writes.finish();
  if (!on_cuda(s)) return causal_conv_forward(s.p, to, state);
  cuda::causal_conv_forward(stream_of(s.on(), stream), s.p, s.begin, to, state);
}

void py_conv_backward(const TensorView& d_out, const Optional& d_final, const TensorView& x,
                      const TensorView& weight, const Optional& bias, const Optional& initial,
                      const Optional& seq_idx, const Optional& cu_seqlens, bool silu,
                      const Optional& dx, const Optional& dweight, const Optional& dbias,
                      const Optional& dinitial, const Optional& scratch, uintptr_t stream) {
  ConvArguments s("causal_conv1d.backward", x, weight, bias, initial, seq_idx, cu_seqlens, silu);
  s.without_seq_idx(d_final, "d_final");
  s.needs(dbias, "dbias", bias.has_value(), "bias");
  s.needs(dinitial, "dinitial", initial.has_value(), "initial_states");
  CausalConvGradients g;
  g.d_out = s.input(d_out, "d_out", {s.dtype()}, s.like_x);
  g.d_final = s.input(d_final, "d_final", {s.dtype()}, s.like_initial);
  g.dx = s.output(dx, "dx", {s.dtype()}, s.like_x);
  g.dweight = s.output(dweight, "dweight", {s.wide()}, s.like_weight);
  g.dbias = s.output(dbias, "dbias", {s.wide()}, s.like_bias);
  g.dinitial = s.output(dinitial, "dinitial", {s.dtype()}, s.like_initial);
  s.writes.finish();
  if (!on_cuda(s)) return causal_conv_backward(s.p, g);
  const int64_t bytes =
      cuda::causal_conv_backward_scratch(s.p.batch, s.p.dim, s.p.length, s.p.width);
  cuda::causal_conv_backward(stream_of(s.on(), stream), s.p, s.begin, g,
                             scratch_of(scratch, s.op(), bytes, s.on()));
}

// x and out: (B, D, L), or (B, D) for one step.
void py_conv_update(const TensorView& x, const TensorView& state, const TensorView& weight,
                    const Optional& bias, bool silu, const Optional& rows,
                    const Optional& positions, const TensorView& out, uintptr_t stream) {
  if (x.rank == 2 && out.rank == 2)
    return py_conv_update(expanded(x, 2), state, weight, bias, silu, rows, positions,
                          expanded(out, 2), stream);
  ConvArguments s("causal_conv1d_update", x, weight, bias, {}, {}, {}, silu);
  ConvUpdate update;
  update.conv = s.p;
  expect(state, s.op(), "conv_state", {state.dtype}, 3, s.on());
  update.state_length = state.shape[2];
  if (update.state_length < s.p.width - 1)
    s.refuse("conv_state has shape " + shape_text(state) + ", expected " +
             std::to_string(s.p.width - 1) + " columns or more");
  const CacheRows cache(s, rows, "conv_state_indices", s.p.batch, state.shape[0], "conv_state");
  update.rows = cache.list;
  const cuda::Indices places = indices_of(s, positions, "cache_seqlens");
  if (positions) lists::expect_shape(*positions, s.op(), "cache_seqlens", {s.p.batch});
  if (positions && !s.on().is_cuda()) {
    update.positions = lists::integers(*positions, s.op(), "cache_seqlens");
    for (int64_t position : update.positions)
      if (position < 0 || position > INT64_MAX - s.p.length)
        s.refuse("cache_seqlens holds " + std::to_string(position) + ", expected 0 or more");
  }
  update.state =
      s.output(state, "conv_state", {s.dtype()}, {state.shape[0], s.p.dim, update.state_length});
  update.out = s.output(out, "out", {s.dtype()}, s.like_x);
  s.writes.finish();
  if (!on_cuda(s)) return causal_conv_update(update);
  cuda::causal_conv_update(stream_of(s.on(), stream), update, cache.indices, places,
                           state.shape[0]);
}

}  // namespace

void bind_scan(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  const auto no_scratch = py::arg("scratch") = py::none(), default_stream = py::arg("stream") = 0;
  const auto arg = [](const char* name) { return py::arg(name); };
  m.attr("scan_chunk") = kChunk;
  m.def("selective_scan_forward", &py_scan_forward, arg("u"), arg("delta"), arg("A"), arg("B"),
        arg("C"), arg("D"), arg("z"), arg("delta_bias"), arg("initial"), arg("cu_seqlens"),
        arg("softplus"), arg("reverse"), arg("complex"), arg("out"), arg("last"), arg("stored"),
        no_scratch, default_stream, release);
  m.def("selective_scan_forward_scratch",
        [](int64_t batch, int64_t dim, int64_t length, int64_t states, bool complex,
           int64_t sequences, bool packed) {
          return cuda::selective_scan_forward_scratch(batch, dim, length, states, complex,
                                                      sequences, packed);
        });
  m.def("selective_scan_backward", &py_scan_backward, arg("d_out"), arg("d_last"), arg("stored"),
        arg("u"), arg("delta"), arg("A"), arg("B"), arg("C"), arg("D"), arg("z"), arg("delta_bias"),
        arg("initial"), arg("cu_seqlens"), arg("softplus"), arg("reverse"), arg("complex"),
        arg("du"), arg("ddelta"), arg("dA"), arg("dB"), arg("dC"), arg("dD"), arg("dz"),
        arg("ddelta_bias"), arg("dinitial"), no_scratch, default_stream, release);
  m.def("selective_scan_backward_scratch",
        [](int64_t batch, int64_t dim, int64_t length, int64_t states, int64_t groups, bool complex,
           int64_t sequences, bool packed) {
          return cuda::selective_scan_backward_scratch(batch, dim, length, states, groups, complex,
                                                       sequences, packed);
        });
  m.def("selective_state_update", &py_state_update, arg("state"), arg("x"), arg("dt"), arg("A"),
        arg("B"), arg("C"), arg("D"), arg("z"), arg("dt_bias"), arg("softplus"), arg("rows"),
        arg("out"), default_stream, release);
  m.def("few_rows_linear", &py_few_rows_linear, arg("x"), arg("weight"), arg("bias"), arg("out"),
        default_stream, release);
  m.def("recurrence_forward", &py_recurrence_forward, arg("a"), arg("x"), arg("h0"), arg("h"),
        arg("log_space"), arg("reverse"), arg("complex"), default_stream, release);
  m.def("recurrence_backward", &py_recurrence_backward, arg("a"), arg("h0"), arg("h"), arg("dh"),
        arg("da"), arg("dx"), arg("dh0"), arg("log_space"), arg("reverse"), arg("complex"),
        default_stream, release);
  m.def("causal_conv_forward", &py_conv_forward, arg("x"), arg("weight"), arg("bias"),
        arg("initial"), arg("seq_idx"), arg("cu_seqlens"), arg("silu"), arg("out"), arg("final"),
        default_stream, release);
  m.def("causal_conv_backward", &py_conv_backward, arg("d_out"), arg("d_final"), arg("x"),
        arg("weight"), arg("bias"), arg("initial"), arg("seq_idx"), arg("cu_seqlens"), arg("silu"),
        arg("dx"), arg("dweight"), arg("dbias"), arg("dinitial"), no_scratch, default_stream,
        release);
  m.def("causal_conv_backward_scratch", &cuda::causal_conv_backward_scratch);
  m.def("causal_conv_update", &py_conv_update, arg("x"), arg("state"), arg("weight"), arg("bias"),
        arg("silu"), arg("rows"), arg("positions"), arg("out"), default_stream, release);
}

}  // namespace pentad
