// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

namespace pentad {
void bind_common(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_attention_cache(pybind11::module_& m);
void bind_hamming(pybind11::module_& m);
void bind_matrix_scan(pybind11::module_& m);
void bind_pq_assign(pybind11::module_& m);
void bind_pq_lookup(pybind11::module_& m);
void bind_pq_product_keys(pybind11::module_& m);
void bind_pq_scan(pybind11::module_& m);
void bind_scan(pybind11::module_& m);
void bind_scan2d(pybind11::module_& m);
void bind_sparse_index(pybind11::module_& m);
void bind_sparse_score(pybind11::module_& m);
void bind_sparse_score_cuda(pybind11::module_& m);
void bind_sparse_select(pybind11::module_& m);
void bind_sparse_splade(pybind11::module_& m);
}  // namespace pentad

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pentad. Use the functions of the package, which check and document.";
  m.attr("__version__") = PENTAD_VERSION;
  pentad::bind_common(m);
  pentad::bind_attention(m);
  pentad::bind_attention_cache(m);
  pentad::bind_hamming(m);
  pentad::bind_matrix_scan(m);
  pentad::bind_pq_assign(m);
  pentad::bind_pq_lookup(m);
  pentad::bind_pq_product_keys(m);
  pentad::bind_pq_scan(m);
  pentad::bind_scan(m);
  pentad::bind_scan2d(m);
  pentad::bind_sparse_index(m);
  pentad::bind_sparse_score(m);
  pentad::bind_sparse_score_cuda(m);
  pentad::bind_sparse_select(m);
  pentad::bind_sparse_splade(m);
}
