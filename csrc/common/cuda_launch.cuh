// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel, and the arrays that a block shares. A *.cu source includes this
// and no header of CUDA, so that it compiles as C++ for the CPU as well (cuda_host/), where its
// tests run without a device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/ceil_div.h"
#include "common/cuda_stream.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "common/cuda_host/cuda_host.h"
#endif

namespace pentad {

// Room for an array in shared memory: arrays begin at multiples of 16 bytes, or of what is asked for.
template <class T, size_t alignment = 16>
__host__ __device__ constexpr size_t shared_bytes(int64_t count) {
  return (sizeof(T) * static_cast<size_t>(count) + alignment - 1) / alignment * alignment;
}

// Hands out the block's shared memory array by array; every lane takes the same ones in the same
// order. take<float[33]>(32) is a tile. Arrays of a larger alignment are taken first.
class Shared {
 public:
#if defined(__CUDACC__)
  __device__ Shared() {
    extern __shared__ __align__(1024) unsigned char pentad_shared_memory[];
    next_ = pentad_shared_memory;
  }
  template <class T, size_t alignment = 16>
  __device__ T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += shared_bytes<T, alignment>(count);
    return array;
  }

 private:
  unsigned char* next_;
#else
  template <class T, size_t alignment = 16>
  T* take(int64_t count) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(count);
    return static_cast<T*>(cuda_host::shared_array(bytes, alignment));
  }
#endif
};

// Blocks in a row, of which a grid takes 2^31 - 1.
inline unsigned blocks_of(int64_t count) {
  if (count < 1 || count > 0x7fffffff)
    throw std::invalid_argument("a CUDA kernel cannot take arrays of this size: it would need " +
                                std::to_string(count) + " blocks");
  return static_cast<unsigned>(count);
}

struct Grid {
  dim3 blocks, lanes;
  size_t shared = 0;  // bytes, the sum of shared_bytes
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here is not reported again
  throw DeviceError(std::string(what) + ": " + cudaGetErrorString(error));
}

// The current device of this thread, for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "no CUDA device");
    if (device != before_) check_cuda(cudaSetDevice(device), "CUDA device");
    else before_ = -1;
  }
  ~DeviceGuard() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

// 90 for compute capability 9.0.
inline int compute_capability(int device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "CUDA");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "CUDA");
  return major * 10 + minor;
}

// Puts the kernel on the stream and returns; nothing waits for it.
template <class... Parameters>
void launch(const CudaStream& on, const char* name, void (*kernel)(Parameters...), const Grid& grid,
            std::type_identity_t<Parameters>... arguments) {
  const DeviceGuard guard(on.device);
  constexpr size_t kGranted = 48 << 10;  // more has to be asked for
  if (grid.shared > kGranted)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(grid.shared)),
               name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.lanes;
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(on.stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

#else

inline int compute_capability(int) { return 80; }

template <class... Parameters>
void launch(const CudaStream&, const char*, void (*kernel)(Parameters...), const Grid& grid,
            std::type_identity_t<Parameters>... arguments) {
  cuda_host::run(grid.blocks, grid.lanes, grid.shared, [&] { kernel(arguments...); });
}

#endif

// The number of this lane in its warp.
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

constexpr uint32_t kFullWarp = 0xffffffff;

}  // namespace pentad
