// SPDX-License-Identifier: Apache-2.0
#include <atomic>

#include "attention/attention_drive.h"
#include "bindings/tensor_caster.h"
#include "common/cuda_info.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/stream_read.h"
#include "common/topk.h"

namespace py = pybind11;

namespace pentad {

void bind_common(py::module_& m) {
  py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError).attr("__doc__") =
      "A missing device, one that no kernel serves, or arguments on different devices.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const TypeMismatch& e) {
      py::set_error(PyExc_TypeError, e.what());
    }
  });

  isa();          // an unusable PENTAD_ISA fails the import, with the reason
  num_threads();  // registers the fork handler before anything forks

  m.def("isa", [] { return std::string(name(isa())); });
  m.def("isa_available", [] {
    std::vector<std::string> names;
    for (Isa level : isa_available()) names.push_back(name(level));
    return names;
  });
  m.def("set_isa", [](const std::string& level) { set_isa(isa_from_name(level.c_str())); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", [](int64_t n) {
    if (n < 1 || n > kMostThreads)
      bad_value("set_num_threads",
                "n is " + std::to_string(n) + ", expected 1 to " + std::to_string(kMostThreads));
    set_num_threads(static_cast<int>(n));
  });
  m.def("thread_runtime", [] { return std::string(thread_runtime()); });
  m.def("cuda_built", &cuda_built);
  m.attr("cuda_on_host") = cuda_on_host();
  m.def("cuda_devices", &cuda_devices);
  // Calls a counter `tasks` times in a parallel region and returns it: for tests of the threads.
  m.def(
      "count_tasks",
      [](int64_t tasks) {
        std::atomic<int64_t> count{0};
        parallel_for(tasks, [&](int64_t) { count.fetch_add(1); });
        return count.load();
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "stream_read",
      [](const TensorView& data) {
        expect(data, "stream_read", "data", {DType::u8}, 1);
        if (!is_contiguous(data)) bad_value("stream_read", "data is not contiguous");
        return stream_read(static_cast<const uint8_t*>(data.data), data.shape[0]);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("best_of", [](const TensorView& scores, const TensorView& ids, bool largest,
                      const TensorView& best, const TensorView& best_ids) {
    const char* op = "best_of";
    expect(scores, op, "scores", {DType::f32}, 2);
    expect(ids, op, "ids", {DType::i64}, 2);
    const int64_t queries = scores.shape[0], candidates = scores.shape[1];
    if (!is_contiguous(scores) || !is_contiguous(ids) || ids.shape[0] != queries ||
        ids.shape[1] != candidates)
      bad_value(op, "scores and ids are not contiguous or of different shapes");
    expect(best, op, "best", {DType::f32}, 2);
    expect_output(best, op, "best", DType::f32, {queries, best.shape[1]});
    expect_output(best_ids, op, "best_ids", DType::i64, {queries, best.shape[1]});
    py::gil_scoped_release release;
    best_of(static_cast<const float*>(scores.data), static_cast<const int64_t*>(ids.data), queries,
            candidates, largest, best.shape[1], static_cast<float*>(best.data),
            static_cast<int64_t*>(best_ids.data));
  });
  // `rounds` of 12 multiply-adds of full vectors on every thread, of bf16 pairs if asked and the
  // level has them; the operations done, two per multiply-add: for the peak in benchmarks.
  m.def(
      "multiply_adds",
      [](int64_t rounds, bool bf16) {
        if (rounds < 0) bad_value("multiply_adds", "rounds is negative");
        const attention::Kernels& kernels = attention::kernels();
        const bool pairs = bf16 && kernels.dot_bf16;
        const int64_t threads = num_threads();
        parallel_for(threads, [&](int64_t) { kernels.multiply_adds(rounds, pairs); });
        return threads * rounds * attention::kPeakSums * kernels.lanes * (pairs ? 4 : 2);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace pentad
