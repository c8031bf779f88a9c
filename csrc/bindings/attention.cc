// SPDX-License-Identifier: Apache-2.0
// The entries of attention. Everything that could make a kernel read or write out of bounds is
// refused here, before anything is written.
#include <utility>

#include "attention/attention_hopper.h"
#include "bindings/attention_arguments.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace attention;

// --- On a device ---------------------------------------------------------------------------------

bool runs_on_device(const Arguments& a, bool cached) {
  const bool wide = a.problem.q.dtype == DType::f64;
  return runs_cuda(a.on, !wide && !cached, "attention", wide ? "float64" : "caches");
}

// Of lse.
int64_t rows(const Arguments& a) {
  return a.problem.heads * a.q_tokens * (a.packed ? 1 : a.problem.batch);
}

// --- Entries ---------------------------------------------------------------------------------------

void py_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                const TensorView& out, const Optional& lse, const Optional& key_mass,
                const Optional& bias, const Optional& key_bias, const Optional& alibi,
                const Optional& sink, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                const Optional& k_lengths, const Optional& cache_rows, const Optional& left_pad,
                const Optional& block_table, const MaskArgument& mask, Scale scale, double softcap,
                int64_t left, int64_t right, bool top_left, double dropout, const Optional& seed,
                const Optional& scratch, uintptr_t stream) {
  Arguments a("attention");
  a.set_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k);
  a.set_caches(k, k_lengths, cache_rows, left_pad, block_table, 0, "k_lengths");
  a.set_options({bias, key_bias, alibi, sink, scale, softcap, left, right, top_left, dropout, seed},
                mask);
  const Problem& p = a.problem;
  Outputs outputs;
  outputs.out = a.rows(out, "out", false, p.value_dim, true);
  if (lse) outputs.lse = a.row_statistics(*lse, "lse", true);
  if (key_mass && !lse) bad_value("attention", "key_mass needs lse");
  if (key_mass) outputs.key_mass = a.key_statistics(*key_mass, "key_mass", p.heads, true);
  a.writes.finish();
  if (!runs_on_device(a, k_lengths.has_value())) return forward(p, outputs);
  const int64_t bytes = key_mass ? cuda::scratch_bytes(rows(a)) : 0;
  cuda::forward(stream_of(a.on, stream), a.on_device(), a.boundaries, outputs,
                scratch_of(scratch, "attention", bytes, a.on));
}

// The above without options, for the arguments of which a small call would pay.
void py_plain(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
              Scale scale, int64_t left, int64_t right, bool top_left, uintptr_t stream) {
  Arguments a("attention");
  const Optional none;
  a.set_inputs(q, k, v, none, none);
  a.set_caches(k, none, none, none, none, 0, "");
  a.set_options({none, none, none, none, scale, 0.0, left, right, top_left, 0.0, none}, {});
  Outputs outputs;
  outputs.out = a.rows(out, "out", false, a.problem.value_dim, true);
  a.writes.finish();
  if (!runs_on_device(a, false)) return forward(a.problem, outputs);
  cuda::forward(stream_of(a.on, stream), a.problem, {}, outputs, nullptr);
}

void py_backward(const TensorView& q, const TensorView& k, const TensorView& v,
                 const TensorView& out, const TensorView& lse, const TensorView& d_out,
                 const Optional& d_lse, const Optional& d_key_mass, const Optional& dq,
                 const Optional& dk, const Optional& dv, const Optional& dbias,
                 const Optional& dkey_bias, const Optional& dsink, const Optional& bias,
                 const Optional& key_bias, const Optional& alibi, const Optional& sink,
                 const Optional& cu_seqlens_q, const Optional& cu_seqlens_k,
                 const MaskArgument& mask, Scale scale, double softcap, int64_t left, int64_t right,
                 bool top_left, double dropout, const Optional& seed, const Optional& scratch,
                 uintptr_t stream) {
  constexpr const char* op = "attention.backward";
  Arguments a(op);
  a.set_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k);
  a.set_caches(k, std::nullopt, std::nullopt, std::nullopt, std::nullopt, 0, "");
  a.set_options({bias, key_bias, alibi, sink, scale, softcap, left, right, top_left, dropout, seed},
                mask);
  const Problem& p = a.problem;
  Gradients g;
  g.out = a.rows(out, "out", false, p.value_dim, false);
  g.lse = a.row_statistics(lse, "lse", false);
  g.d_out = a.rows(d_out, "d_out", false, p.value_dim, false);
  if (d_lse) g.d_lse = a.row_statistics(*d_lse, "d_lse", false);
  if (d_key_mass) g.d_key_mass = a.key_statistics(*d_key_mass, "d_key_mass", p.heads, false);
  if (dq) g.dq = a.rows(*dq, "dq", false, p.dim, true);
  if (dk) g.dk = a.rows(*dk, "dk", true, p.dim, true);
  if (dv) g.dv = a.rows(*dv, "dv", true, p.value_dim, true);
  if (dbias) {
    if (!bias || bias->dtype == DType::boolean) bad_value(op, "dbias needs a bias of numbers");
    if (bias->shape[2] != p.max_q)
      bad_value(op, "dbias needs a bias whose query dimension is not broadcast");
    expect_output(*dbias, op, "dbias", statistics(p.q.dtype),
                  {bias->shape[0], bias->shape[1], bias->shape[2], bias->shape[3]}, a.on);
    a.writes.output("dbias", *dbias);
    g.dbias = {dbias->data, dbias->dtype, {}};
    for (int i = 0; i < 4; ++i) g.dbias.stride[i] = dbias->shape[i] == 1 ? 0 : dbias->strides[i];
  }
  if (dkey_bias) {
    if (!key_bias) bad_value(op, "dkey_bias needs a key_bias");
    g.dkey_bias = a.key_statistics(*dkey_bias, "dkey_bias", p.key_bias_heads, true);
  }
  if (dsink) {
    if (!sink) bad_value(op, "dsink needs a sink");
    expect_output(*dsink, op, "dsink", statistics(p.q.dtype), {p.heads}, a.on);
    a.writes.output("dsink", *dsink);
    g.dsink = dsink->data;
  }
  a.writes.finish();
  if (!runs_on_device(a, false)) return backward(p, g);
  cuda::backward(stream_of(a.on, stream), a.on_device(), a.boundaries, g,
                 scratch_of(scratch, op, cuda::scratch_bytes(rows(a)), a.on));
}

// Of the parameters all but the last kOptional have no names.
template <int kOptional, class... Parameters, class... Extra>
void define(py::module_& m, const char* name, void (*function)(Parameters...),
            const Extra&... extra) {
  const auto with = [&]<size_t... I>(std::index_sequence<I...>) {
    m.def(name, function, (static_cast<void>(I), py::arg())..., extra...);
  };
  with(std::make_index_sequence<sizeof...(Parameters) - kOptional>{});
}

}  // namespace

void bind_attention(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  const auto no_scratch = py::arg("scratch") = py::none(), default_stream = py::arg("stream") = 0;
  define<2>(m, "attention_forward", &py_forward, no_scratch, default_stream, release);
  define<1>(m, "attention_plain", &py_plain, default_stream, release);
  define<2>(m, "attention_backward", &py_backward, no_scratch, default_stream, release);
  m.def("attention_scratch", &cuda::scratch_bytes);
  m.def("attention_want_hopper", &cuda::want_hopper);
}

}  // namespace pentad
