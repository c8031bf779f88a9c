// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor_caster.h"

#include <algorithm>
#include <cstring>

#include "bindings/dlpack_abi.h"
#include "common/cuda_info.h"

namespace py = pybind11;

namespace pentad {
namespace {

std::string type_name(py::handle object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

[[noreturn]] void not_an_array(py::handle object, const std::string& why = "") {
  throw TypeMismatch("expected a torch tensor or a numpy array, not " + type_name(object) + why);
}

void set_dtype(TensorView& view, const dlpack::DataType& type, py::handle object) {
  using namespace dlpack;
  const int bits = type.bits;
  if (type.lanes == 1) {
    if (type.code == kUInt || type.code == kInt) {
      const bool is_signed = type.code == kInt;
      switch (bits) {
        case 8: view.dtype = is_signed ? DType::i8 : DType::u8; return;
        case 16: view.dtype = is_signed ? DType::i16 : DType::u16; return;
        case 32: view.dtype = is_signed ? DType::i32 : DType::u32; return;
        case 64: view.dtype = is_signed ? DType::i64 : DType::u64; return;
      }
    } else if (type.code == kFloat) {
      switch (bits) {
        case 16: view.dtype = DType::f16; return;
        case 32: view.dtype = DType::f32; return;
        case 64: view.dtype = DType::f64; return;
      }
    } else if (type.code == kBfloat && bits == 16) {
      view.dtype = DType::bf16;
      return;
    } else if (type.code == kBool && bits == 8) {
      view.dtype = DType::boolean;
      return;
    }
  }
  not_an_array(object, " of an element type that no kernel takes");
}

void set_shape(TensorView& view, int rank, py::handle object) {
  if (rank > TensorView::kMaxRank)
    not_an_array(object, " of more than " + std::to_string(TensorView::kMaxRank) + " dimensions");
  view.rank = rank;
}

void set_from_dlpack(TensorView& view, const dlpack::Tensor& tensor, py::handle object) {
  set_dtype(view, tensor.dtype, object);
  set_shape(view, tensor.ndim, object);
  view.data = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
  view.device_type = tensor.device.type == dlpack::kCudaHost ? dlpack::kCpu : tensor.device.type;
  view.device_id = tensor.device.id;
  int64_t contiguous = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides ? tensor.strides[i] : contiguous;
    contiguous *= tensor.shape[i];
  }
}

void set_from_buffer(TensorView& view, const Py_buffer& buffer, py::handle object) {
  const char* format = buffer.format ? buffer.format : "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  dlpack::DataType type{dlpack::kUInt, static_cast<uint8_t>(buffer.itemsize * 8), 1};
  if (std::strlen(format) != 1) not_an_array(object, " of a structured or byte-swapped type");
  if (std::strchr("bhilqn", *format)) type.code = dlpack::kInt;
  else if (std::strchr("efd", *format)) type.code = dlpack::kFloat;
  else if (*format == '?') type.code = dlpack::kBool;
  else if (!std::strchr("BHILQN", *format)) type.lanes = 0;
  set_dtype(view, type, object);
  set_shape(view, buffer.ndim, object);
  view.data = buffer.buf;
  view.read_only = buffer.readonly;
  for (int i = 0; i < buffer.ndim; ++i) {
    view.shape[i] = buffer.shape[i];
    if (buffer.strides[i] % buffer.itemsize)
      not_an_array(object, " whose strides are no multiple of its element size");
    view.strides[i] = buffer.strides[i] / buffer.itemsize;
  }
}

void remember(PyTypeObject*& known, PyTypeObject* type) {
  Py_INCREF(type);
  Py_XDECREF(known);
  known = type;
}

// The exchange API of the argument's type, or null. The last type that had one is remembered, and
// the last that had none: in practice they are torch.Tensor and numpy.ndarray. A look-up would cost
// more than the exchange, and one that fails 0.5 us, of each array.
const dlpack::ExchangeApi* exchange_api(py::handle object) {
  static PyTypeObject *known_type = nullptr, *plain_type = nullptr;
  static const dlpack::ExchangeApi* known_api = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == known_type) return known_api;
  if (type == plain_type) return nullptr;
  py::object capsule =
      py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) {
    remember(plain_type, type);
    return nullptr;
  }
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->version.major != 1) return nullptr;
  remember(known_type, type);
  known_api = api;
  return api;
}

}  // namespace

ViewHolder::~ViewHolder() {
  if (buffer_.obj) PyBuffer_Release(&buffer_);
}

void ViewHolder::borrow(py::handle object) {
  if (const dlpack::ExchangeApi* api = exchange_api(object)) {
    dlpack::Tensor tensor;
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
    set_from_dlpack(view, tensor, object);
    return;
  }
  if (PyObject_CheckBuffer(object.ptr())) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      not_an_array(object, " whose element type has no buffer format");
    }
    set_from_buffer(view, buffer_, object);
    return;
  }
  if (!py::hasattr(object, "__dlpack__")) not_an_array(object);
  capsule_ = object.attr("__dlpack__")();
  const char* name = PyCapsule_GetName(capsule_.ptr());
  if (name && std::strcmp(name, "dltensor") == 0) {
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), name));
    set_from_dlpack(view, managed->tensor, object);
  } else if (name && std::strcmp(name, "dltensor_versioned") == 0) {
    auto* managed =
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule_.ptr(), name));
    if (managed->version.major != 1) not_an_array(object, " of an unknown DLPack version");
    set_from_dlpack(view, managed->tensor, object);
    view.read_only = managed->flags & dlpack::kReadOnly;
  } else {
    PyErr_Clear();
    not_an_array(object, " (its __dlpack__ returned no DLPack capsule)");
  }
}

const char* dtype_name(DType dtype) {
  static const char* const names[] = {"uint8",   "int8",    "uint16", "int16",   "uint32",
                                      "int32",   "uint64",  "int64",  "float16", "bfloat16",
                                      "float32", "float64", "bool"};
  return names[static_cast<int>(dtype)];
}

std::string shape_text(const TensorView& view) {
  std::string text = "(";
  for (int i = 0; i < view.rank; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
  return text + (view.rank == 1 ? ",)" : ")");
}

void bad_value(const char* op, const std::string& message) {
  throw std::invalid_argument("[" + std::string(op) + "] " + message);
}

Device device_of(const TensorView& view) {
  return view.device_type == dlpack::kCuda ? Device{dlpack::kCuda, view.device_id} : Device{};
}

bool runs_cuda(Device on) { return on.is_cuda() || cuda_on_host(); }

bool runs_cuda(Device on, bool supported, const char* op, const char* unsupported) {
  if (on.is_cuda() && !supported)
    throw DeviceMismatch("[" + std::string(op) + "] there is no CUDA kernel for " + unsupported);
  return supported && runs_cuda(on);
}

CudaStream stream_of(Device on, uintptr_t stream) {
  return {on.id, reinterpret_cast<void*>(stream)};
}

static void wrong_device(const TensorView& view, const char* op, const char* name, Device on) {
  const std::string text = "[" + std::string(op) + "] " + name;
  if (on.is_cuda())
    throw DeviceMismatch(text + " is not on cuda:" + std::to_string(on.id) +
                         ", where the first argument is");
  throw DeviceMismatch(
      text + " is on an accelerator, but " +
      (view.device_type == dlpack::kCuda
           ? "this operation has only a CPU kernel, or its first argument is on the CPU"
           : "this operation has only a CPU kernel"));
}

void expect(const TensorView& view, const char* op, const char* name,
            std::initializer_list<DType> dtypes, int rank, Device on) {
  // No message is begun before it is needed: it would cost more than the checks of a tiny call.
  if (view.device_type != on.type || (on.is_cuda() && view.device_id != on.id))
    wrong_device(view, op, name, on);
  if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
    std::string accepted;
    for (DType dtype : dtypes)
      accepted += std::string(accepted.empty() ? "" : ", ") + dtype_name(dtype);
    throw TypeMismatch("[" + std::string(op) + "] " + name + " has dtype " +
                       dtype_name(view.dtype) + ", expected " + accepted);
  }
  if (rank >= 0 && view.rank != rank)
    bad_value(op, std::string(name) + " has shape " + shape_text(view) + ", expected " +
                      std::to_string(rank) + " dimensions");
  if (view.data) return;
  for (int i = 0; i < view.rank; ++i)
    if (!view.shape[i]) return;
  bad_value(op, std::string(name) + " has no memory (a fake or meta tensor?)");
}

void expect_output(const TensorView& view, const char* op, const char* name, DType dtype,
                   std::initializer_list<int64_t> shape, Device on) {
  expect(view, op, name, {dtype}, static_cast<int>(shape.size()), on);
  if (view.read_only) bad_value(op, std::string(name) + " is read-only");
  for (int i = 0; i < view.rank; ++i)
    if (view.shape[i] != shape.begin()[i])
      bad_value(op, std::string(name) + " has the wrong shape " + shape_text(view));
  if (!is_contiguous(view)) bad_value(op, std::string(name) + " is not contiguous");
}

void* scratch_of(const std::optional<TensorView>& view, const char* op, int64_t bytes, Device on) {
  if (bytes == 0) return nullptr;
  if (!view) bad_value(op, "a CUDA kernel needs scratch memory");
  expect(*view, op, "scratch", {DType::u8}, 1, on);
  if (view->read_only || !is_contiguous(*view) || view->shape[0] < bytes)
    bad_value(op, "scratch has shape " + shape_text(*view) + ", expected " + std::to_string(bytes) +
                      " contiguous bytes");
  return view->data;
}

bool is_contiguous(const TensorView& view) {
  int64_t expected = 1;
  bool regular = true;
  for (int i = view.rank - 1; i >= 0; --i) {
    regular = regular && (view.shape[i] == 1 || view.strides[i] == expected);
    expected *= view.shape[i];
  }
  return regular || expected == 0;  // without elements any strides will do
}

}  // namespace pentad
