// SPDX-License-Identifier: Apache-2.0
// The one way in for arrays: DLPack's C exchange API (torch >= 2.10, 0.05 us), else the buffer
// protocol (numpy), else __dlpack__(). Nothing is copied and no framework is linked. The view
// borrows from the argument, and lives as long as the call.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/cuda_stream.h"
#include "common/tensor_view.h"

namespace pentad {

// Become TypeError and pentad.DeviceError in Python; std::invalid_argument becomes ValueError.
struct TypeMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct DeviceMismatch : DeviceError {
  using DeviceError::DeviceError;
};

class ViewHolder {
 public:
  ViewHolder() = default;
  ~ViewHolder();
  ViewHolder(const ViewHolder&) = delete;
  ViewHolder& operator=(const ViewHolder&) = delete;
  // Throws TypeMismatch for what is no array, or has an element type that no kernel takes.
  void borrow(pybind11::handle object);

  TensorView view;

 private:
  Py_buffer buffer_{};
  pybind11::object capsule_;
};

// --- Checks, each in one place. `op` and `name` begin the message: "[hamming.topk] codes ..." ----

std::string shape_text(const TensorView& view);
const char* dtype_name(DType dtype);
bool is_contiguous(const TensorView& view);
[[noreturn]] void bad_value(const char* op, const std::string& message);

// Where an operation runs, in DLPack's numbers: the CPU unless said otherwise.
struct Device {
  int type = 1, id = 0;
  bool is_cuda() const { return type == 2; }
};
// Of the first argument of an operation that has CUDA kernels; the others are to be there too.
Device device_of(const TensorView& view);
// Whether the CUDA kernels are to run: on a device, and on the CPU in the build that tests them
// there. Where they do not take such arguments ("float64", say), that is an error on a device.
bool runs_cuda(Device on);
bool runs_cuda(Device on, bool supported, const char* op, const char* unsupported);
// An operation with CUDA kernels takes, behind its own arguments, their scratch memory and the
// stream as a number; the CPU needs neither.
CudaStream stream_of(Device on, uintptr_t stream);

// Memory on this device, of one of these types and this rank (-1: any).
void expect(const TensorView& view, const char* op, const char* name,
            std::initializer_list<DType> dtypes, int rank, Device on = {});
// An output: as above, and of this exact shape, contiguous and writable.
void expect_output(const TensorView& view, const char* op, const char* name, DType dtype,
                   std::initializer_list<int64_t> shape, Device on = {});
// Memory for a CUDA kernel's own use, of at least this many bytes.
void* scratch_of(const std::optional<TensorView>& view, const char* op, int64_t bytes, Device on);

template <class T>
Matrix<T> matrix(const TensorView& view) {
  return {static_cast<T*>(view.data), view.shape[0], view.shape[1], view.strides[0],
          view.strides[1]};
}

}  // namespace pentad

namespace pybind11::detail {

template <>
struct type_caster<pentad::TensorView> {
 public:
  static constexpr auto name = const_name("Array");
  template <class>
  using cast_op_type = const pentad::TensorView&;

  bool load(handle source, bool) {
    if (source.is_none()) return false;
    holder_.borrow(source);
    return true;
  }
  operator const pentad::TensorView&() const { return holder_.view; }

 private:
  pentad::ViewHolder holder_;
};

// An optional view: the holder must outlive the call, so the value is kept beside it.
template <>
struct type_caster<std::optional<pentad::TensorView>> {
 public:
  static constexpr auto name = const_name("Array | None");
  template <class>
  using cast_op_type = const std::optional<pentad::TensorView>&;

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    holder_.emplace().borrow(source);
    value_ = holder_->view;
    return true;
  }
  operator const std::optional<pentad::TensorView>&() const { return value_; }

 private:
  std::optional<pentad::ViewHolder> holder_;
  std::optional<pentad::TensorView> value_;
};

}  // namespace pybind11::detail
