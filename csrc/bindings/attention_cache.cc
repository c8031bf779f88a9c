// SPDX-License-Identifier: Apache-2.0
// The entries of decoding: attention to caches, and appending to them. Everything that could make a
// kernel read or write out of bounds is refused here, before anything is written; but for what lists
// on a CUDA device hold, which the kernels themselves look at (attention_cache_cuda.h).
#include <algorithm>
#include <vector>

#include "attention/attention_cache_cuda.h"
#include "bindings/attention_arguments.h"

namespace py = pybind11;

namespace pentad {
namespace {

using namespace attention;

cuda::Integers integers_of(const Optional& view) {
  if (!view) return {};
  return {view->data, view->dtype == DType::i64, view->strides[0]};
}

cuda::Caches caches_of(const TensorView& k_cache, const TensorView& lengths, const Optional& rows,
                       const Optional& left_pad, const Optional& table) {
  cuda::Caches caches;
  caches.lengths = integers_of(lengths);
  caches.rows = integers_of(rows);
  caches.left_pad = integers_of(left_pad);
  caches.cache_rows = k_cache.shape[0];
  caches.capacity = k_cache.shape[2];
  if (!table) return caches;
  caches.table = static_cast<const int32_t*>(table->data);
  caches.table_stride[0] = table->strides[0];
  caches.table_stride[1] = table->strides[1];
  caches.page_size = k_cache.shape[2];
  caches.pages_per_sequence = table->shape[1];
  caches.capacity = caches.page_size * caches.pages_per_sequence;
  // Without an entry a table has no address, which would read as "no pages".
  static const int32_t nothing = 0;
  if (!caches.table) caches.table = &nothing;
  return caches;
}

void py_decode(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& out, const TensorView& lse, const Optional& bias,
               const Optional& alibi, const Optional& sink, const TensorView& lengths,
               const Optional& cache_rows, const Optional& left_pad, const Optional& block_table,
               Scale scale, double softcap, int64_t left, int64_t right, const Optional& scratch,
               uintptr_t stream) {
  constexpr const char* op = "attention.decode";
  const bool on_cuda = runs_cuda(device_of(q), q.dtype != DType::f64, op, "float64");
  const Optional none;
  Arguments a(op);
  a.set_inputs(q, k_cache, v_cache, none, none);
  a.set_caches(k_cache, lengths, cache_rows, left_pad, block_table, 0, "k_lengths");
  a.set_options({bias, none, alibi, sink, scale, softcap, left, right, false, 0.0, none}, {});
  const Problem& p = a.problem;
  Outputs outputs;
  outputs.out = a.rows(out, "out", false, p.value_dim, true);
  outputs.lse = a.row_statistics(lse, "lse", true);
  a.writes.finish();
  if (!on_cuda) return forward(p, outputs);
  const cuda::Caches caches = caches_of(k_cache, lengths, cache_rows, left_pad, block_table);
  const int64_t bytes = cuda::decode_scratch(p.batch, p.heads, p.kv_heads, p.max_q, caches.capacity,
                                             p.value_dim, size_of(q.dtype));
  cuda::decode(stream_of(a.on, stream), p, caches, outputs, scratch_of(scratch, op, bytes, a.on));
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
               const Optional& cache_rows, const Optional& left_pad, const Optional& block_table,
               uintptr_t stream) {
  constexpr const char* op = "attention.append";
  const std::initializer_list<DType> dtypes = {DType::f32, DType::bf16, DType::f16, DType::f64};
  const Device on = device_of(k_cache);
  const bool on_cuda = runs_cuda(on, k_cache.dtype != DType::f64, op, "float64");
  expect(k_cache, op, "k_cache", dtypes, 4, on);
  for (const auto& [view, name] :
       {std::pair{&v_cache, "v_cache"}, std::pair{&k_new, "k_new"}, std::pair{&v_new, "v_new"}}) {
    expect(*view, op, name, dtypes, 4, on);
    if (view->dtype != k_cache.dtype)
      throw TypeMismatch("[" + std::string(op) + "] " + name + " has dtype " +
                         dtype_name(view->dtype) + " but k_cache has " + dtype_name(k_cache.dtype));
  }
  Arguments a(op);
  a.on = on;
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
  if (!on.is_cuda()) check_targets(p, new_tokens, op);
  a.writes.input("k_new", k_new);
  a.writes.input("v_new", v_new);
  a.writes.output("k_cache", k_cache);
  a.writes.output("v_cache", v_cache);
  a.writes.finish();
  if (!on_cuda)
    return append(p, p.k_length, operand(k_new, false), operand(v_new, false), new_tokens);
  cuda::append(stream_of(on, stream), p,
               caches_of(k_cache, cache_lengths, cache_rows, left_pad, block_table),
               operand(k_new, false), operand(v_new, false), new_tokens);
}

}  // namespace

void bind_attention_cache(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  const auto no_scratch = py::arg("scratch") = py::none(), default_stream = py::arg("stream") = 0;
  m.def("attention_decode", &py_decode, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("out"), py::arg("lse"), py::arg("bias"), py::arg("alibi"), py::arg("sink"),
        py::arg("lengths"), py::arg("cache_rows"), py::arg("left_pad"), py::arg("block_table"),
        py::arg("scale"), py::arg("softcap"), py::arg("left"), py::arg("right"), no_scratch,
        default_stream, release);
  m.def("attention_decode_scratch", &cuda::decode_scratch);
  m.def("attention_append", &py_append, py::arg("k_new"), py::arg("v_new"), py::arg("k_cache"),
        py::arg("v_cache"), py::arg("cache_lengths"), py::arg("cache_rows"), py::arg("left_pad"),
        py::arg("block_table"), default_stream, release);
}

}  // namespace pentad
