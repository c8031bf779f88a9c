// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace pentad {

void bind_sparse_splade(py::module_&) {}

}  // namespace pentad
