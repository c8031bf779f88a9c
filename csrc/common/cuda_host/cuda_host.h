// SPDX-License-Identifier: Apache-2.0
// The part of CUDA's language that the kernels here use, as plain C++ for the CPU: the same *.cu
// sources compile with it and run lane by lane (executor.h). What is missing does not compile, on
// purpose: __shared__ (kernels take arrays from pentad::Shared, whose bounds can be checked) and
// __activemask (the answer would be an accident).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/cuda_host/executor.h"
#include "common/reals.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// --- Barriers -------------------------------------------------------------------------------------

namespace pentad::cuda_host {

using Where = std::source_location;

// A collective in which each lane gives `in`, and result(ins, lane) answers each.
template <class In, class Out>
struct Exchange {
  In in;
  Out out;
};

template <class In, class Out, class Result>
void answer(void* const* payloads, int count, Result result) {
  for (int i = 0; i < count; ++i)
    if (payloads[i]) {
      auto& self = *static_cast<Exchange<In, Out>*>(payloads[i]);
      self.out = result(payloads, i);
    }
}

template <class In, class Out>
const In& given(void* const* payloads, int lane) {
  return static_cast<Exchange<In, Out>*>(payloads[lane])->in;
}

// The sum, say, over all lanes that take part: combine(total, in), beginning with the first.
template <class T, auto combine>
T warp_fold(const char* what, uint32_t mask, T value, const Where& where) {
  Exchange<T, T> payload{value, value};
  warp_collective(
      what, mask, &payload,
      [](void* const* payloads, int count) {
        T total{};
        bool first = true;
        for (int i = 0; i < count; ++i) {
          if (!payloads[i]) continue;
          const T& in = given<T, T>(payloads, i);
          total = first ? in : combine(total, in);
          first = false;
        }
        answer<T, T>(payloads, count, [&](void* const*, int) { return total; });
      },
      where);
  return payload.out;
}

// Each lane gets the value of lane source(its lane, its operand, width) of its segment, or its own
// where that lies outside. Reading a lane that does not take part is undefined on a device.
template <class T>
struct ShuffleIn {
  T value;
  int operand, width;
};
template <class T, auto source>
T shuffle(const char* what, uint32_t mask, T value, int operand, int width, const Where& where) {
  using In = ShuffleIn<T>;
  Exchange<In, T> payload{{value, operand, width}, value};
  warp_collective(
      what, mask, &payload,
      [](void* const* payloads, int count) {
        answer<In, T>(payloads, count, [](void* const* all, int lane) {
          const In& self = given<In, T>(all, lane);
          const int segment = lane / self.width * self.width;
          const int from = source(lane - segment, self.operand, self.width);
          if (from < 0 || from >= self.width) return self.value;
          if (!all[segment + from]) throw Misuse("a shuffle reads a lane that is not in its mask");
          return given<In, T>(all, segment + from).value;
        });
      },
      where);
  return payload.out;
}

}  // namespace pentad::cuda_host

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  pentad::cuda_host::block_collective("__syncthreads", nullptr, nullptr, where);
}

inline int __syncthreads_count(
    int predicate, const std::source_location& where = std::source_location::current()) {
  namespace host = pentad::cuda_host;
  host::Exchange<int, int> payload{predicate != 0, 0};
  host::block_collective(
      "__syncthreads_count", &payload,
      [](void* const* payloads, int count) {
        int total = 0;
        for (int i = 0; i < count; ++i) total += host::given<int, int>(payloads, i);
        host::answer<int, int>(payloads, count, [&](void* const*, int) { return total; });
      },
      where);
  return payload.out;
}
inline int __syncthreads_or(int predicate,
                            const std::source_location& where = std::source_location::current()) {
  return __syncthreads_count(predicate, where) != 0;
}

inline void __syncwarp(uint32_t mask = 0xffffffff,
                       const std::source_location& where = std::source_location::current()) {
  pentad::cuda_host::warp_collective("__syncwarp", mask, nullptr, nullptr, where);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// --- Warp collectives -----------------------------------------------------------------------------

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32,
              const std::source_location& where = std::source_location::current()) {
  return pentad::cuda_host::shuffle<T, [](int, int operand, int width) {
    return operand & (width - 1);
  }>("__shfl_sync", mask, value, from, width, where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  const std::source_location& where = std::source_location::current()) {
  return pentad::cuda_host::shuffle<T, [](int lane, int operand, int) { return lane ^ operand; }>(
      "__shfl_xor_sync", mask, value, lanes, width, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32,
                 const std::source_location& where = std::source_location::current()) {
  return pentad::cuda_host::shuffle<T, [](int lane, int operand, int) { return lane - operand; }>(
      "__shfl_up_sync", mask, value, by, width, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32,
                   const std::source_location& where = std::source_location::current()) {
  return pentad::cuda_host::shuffle<T, [](int lane, int operand, int) { return lane + operand; }>(
      "__shfl_down_sync", mask, value, by, width, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              const std::source_location& where = std::source_location::current()) {
  const uint32_t bit = predicate ? 1u << pentad::cuda_host::lane_number() % 32 : 0;
  return pentad::cuda_host::warp_fold<uint32_t, [](uint32_t a, uint32_t b) { return a | b; }>(
      "__ballot_sync", mask, bit, where);
}
inline int __any_sync(uint32_t mask, int predicate,
                      const std::source_location& where = std::source_location::current()) {
  return pentad::cuda_host::warp_fold<int, [](int a, int b) { return a | b; }>(
      "__any_sync", mask, predicate != 0, where);
}
inline int __all_sync(uint32_t mask, int predicate,
                      const std::source_location& where = std::source_location::current()) {
  return pentad::cuda_host::warp_fold<int, [](int a, int b) { return a & b; }>(
      "__all_sync", mask, predicate != 0, where);
}

template <class T>
uint32_t __match_any_sync(uint32_t mask, T value,
                          const std::source_location& where = std::source_location::current()) {
  namespace host = pentad::cuda_host;
  host::Exchange<T, uint32_t> payload{value, 0};
  host::warp_collective(
      "__match_any_sync", mask, &payload,
      [](void* const* payloads, int count) {
        host::answer<T, uint32_t>(payloads, count, [&](void* const* all, int lane) {
          uint32_t equal = 0;
          for (int i = 0; i < count; ++i)
            if (all[i] && host::given<T, uint32_t>(all, i) == host::given<T, uint32_t>(all, lane))
              equal |= 1u << i;
          return equal;
        });
      },
      where);
  return payload.out;
}

// int and unsigned alone, as on a device.
template <class T>
T __reduce_add_sync(uint32_t mask, T value,
                    const std::source_location& where = std::source_location::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return static_cast<T>(
      pentad::cuda_host::warp_fold<uint32_t, [](uint32_t a, uint32_t b) { return a + b; }>(
          "__reduce_add_sync", mask, static_cast<uint32_t>(value), where));
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value,
                    const std::source_location& where = std::source_location::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return pentad::cuda_host::warp_fold<T, [](T a, T b) { return std::min(a, b); }>(
      "__reduce_min_sync", mask, value, where);
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value,
                    const std::source_location& where = std::source_location::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return pentad::cuda_host::warp_fold<T, [](T a, T b) { return std::max(a, b); }>(
      "__reduce_max_sync", mask, value, where);
}

// --- Atomics: one lane runs at a time ---------------------------------------------------------------

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, static_cast<T>(*at + value));
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, std::min(*at, value));
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, std::max(*at, value));
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, *at | value);
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, value);
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

// --- Bits, loads, arithmetic ------------------------------------------------------------------------

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __popcll(uint64_t x) { return std::popcount(x); }
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<uint64_t>(x)) + 1 : 0; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
using std::max, std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// --- 16-bit floats ----------------------------------------------------------------------------------

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(pentad::real_from_half(x.bits)); }
inline float __bfloat162float(__nv_bfloat16 x) {
  return static_cast<float>(pentad::real_from_bf16(x.bits));
}
inline __half __float2half(float x) { return {pentad::real_to_16_bits(x, 10, -14)}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return {pentad::real_to_16_bits(x, 7, -126)}; }
