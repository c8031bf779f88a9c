// SPDX-License-Identifier: Apache-2.0
// The entries of attention. Everything that could make a kernel read or write out of bounds is
// refused here, before anything is written.
#include <algorithm>
#include <utility>
#include <vector>

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

// No two sequences may write to the same place.
void check_targets(const Problem& p, int64_t new_tokens, const char* op) {
  std::vector<int64_t> targets = p.cache_row;
  if (p.page_size)
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t n = p.k_length[b] / p.page_size; n * p.page_size < p.k_length[b] + new_tokens;
           ++n)
        targets.push_back(p.block_table[b * p.pages_per_sequence + n]);
  std::sort(targets.begin(), targets.end());
  if (new_tokens && std::adjacent_find(targets.begin(), targets.end()) != targets.end())
    bad_value(op, p.page_size ? "block_table has one page twice among those that are written"
                              : "cache_rows has one row twice");
}

void py_append(const TensorView& k_new, const TensorView& v_new, const TensorView& k_cache,
               const TensorView& v_cache, const TensorView& cache_lengths,
               const Optional& cache_rows, const Optional& left_pad, const Optional& block_table) {
  constexpr const char* op = "attention.append";
  const std::initializer_list<DType> dtypes = {DType::f32, DType::bf16, DType::f16, DType::f64};
  expect(k_cache, op, "k_cache", dtypes, 4);
  for (const auto& [view, name] :
       {std::pair{&v_cache, "v_cache"}, std::pair{&k_new, "k_new"}, std::pair{&v_new, "v_new"}}) {
    expect(*view, op, name, dtypes, 4);
    if (view->dtype != k_cache.dtype)
      throw TypeMismatch("[" + std::string(op) + "] " + name + " has dtype " +
                         dtype_name(view->dtype) + " but k_cache has " + dtype_name(k_cache.dtype));
  }
  Arguments a(op);
  Problem& p = a.problem;
  p.batch = k_new.shape[0];
  p.heads = p.kv_heads = k_new.shape[1];
  p.dim = k_new.shape[3];
  p.value_dim = v_new.shape[3];
  const int64_t new_tokens = k_new.shape[2];
  expect_shape(v_new, op, "v_new", {p.batch, p.kv_heads, new_tokens, p.value_dim});
  expect_shape(k_cache, op, "k_cache", {k_cache.shape[0], p.kv_heads, k_cache.shape[2], p.dim});
  expect_shape(v_cache, op, "v_cache",
               {k_cache.shape[0], p.kv_heads, k_cache.shape[2], p.value_dim});
  p.q = operand(k_new, false);
  p.k = operand(k_cache, false);
  p.v = operand(v_cache, false);
  a.set_caches(k_cache, cache_lengths, cache_rows, left_pad, block_table, new_tokens,
               "cache_lengths");
  check_targets(p, new_tokens, op);
  a.writes.input("k_new", k_new);
  a.writes.input("v_new", v_new);
  a.writes.output("k_cache", k_cache);
  a.writes.output("v_cache", v_cache);
  a.writes.finish();
  append(p, p.k_length, operand(k_new, false), operand(v_new, false), new_tokens);
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
  m.def("attention_append", &py_append, release);
}

}  // namespace pentad
