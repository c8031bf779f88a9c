// SPDX-License-Identifier: Apache-2.0
// The part of DLPack's C ABI (version 1.3) that is exchanged here, declared from its specification:
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace pentad::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
enum DataTypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous (before 1.2)
  uint64_t byte_offset;
};

// Capsules named "dltensor" and "dltensor_versioned".
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};
constexpr uint64_t kReadOnly = 1;

// The C exchange API, a capsule named "dlpack_exchange_api" in type.__dlpack_c_exchange_api__.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // A borrowed view: valid while the caller keeps the object. 0, or -1 with a Python error set.
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace pentad::dlpack
