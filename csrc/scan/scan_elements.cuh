// SPDX-License-Identifier: Apache-2.0
// What the kernels of scans share: elements of any dtype as floats, functions, complex numbers.
#pragma once
#include "common/cuda_launch.cuh"
#include "scan/scan_cuda.h"

namespace pentad::scan::cuda {

// --- Elements ---------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float& to) { to = x; }
__device__ inline void from_float(float x, __half& to) { to = __float2half(x); }
__device__ inline void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

// Of a dtype that is known when the kernel runs: all lanes take the same branch.
__device__ inline float read(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
  if (dtype == DType::f16) return to_float(static_cast<const __half*>(data)[i]);
  return static_cast<const float*>(data)[i];
}
__device__ inline void write(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::bf16) from_float(x, static_cast<__nv_bfloat16*>(data)[i]);
  else if (dtype == DType::f16) from_float(x, static_cast<__half*>(data)[i]);
  else static_cast<float*>(data)[i] = x;
}

// Four neighbours in memory that begin at a multiple of their size.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};
template <class T>
__device__ void read_four(const T* from, float (&x)[4]) {
  const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = to_float(four.at[i]);
}
template <class T>
__device__ void write_four(T* to, const float (&x)[4]) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) from_float(x[i], four.at[i]);
  *reinterpret_cast<Four<T>*>(to) = four;
}
// Whether every fourth element of the rows (stride 1) begins at such a multiple.
inline bool in_fours(const Operand& x, int dimensions, int contiguous) {
  const int64_t size = 4 * size_of(x.dtype);
  bool fine = x.stride[contiguous] == 1 && reinterpret_cast<uintptr_t>(x.data) % size == 0;
  for (int i = 0; i < dimensions; ++i) fine = fine && (i == contiguous || x.stride[i] % 4 == 0);
  return fine || !x.data;
}

// f(T{}) for the type of a dtype.
template <class F>
void for_type(DType dtype, const F& f) {
  if (dtype == DType::bf16) f(__nv_bfloat16{});
  else if (dtype == DType::f16) f(__half{});
  else f(float{});
}

__device__ inline int64_t at(const Indices& x, int64_t i) {
  return x.dtype == DType::i32 ? static_cast<const int32_t*>(x.data)[i * x.stride]
                               : static_cast<const int64_t*>(x.data)[i * x.stride];
}
__device__ inline int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// --- Sequences: a row of the batch, or a piece of the only one ---------------------------------------

struct Sequence {
  int64_t s, b, first, steps;
};
__device__ inline Sequence sequence_of(const Indices& begin, int64_t s, int64_t length) {
  if (!begin.data) return {s, s, 0, length};
  const int64_t first = clamped(at(begin, s), 0, length);
  return {s, 0, first, clamped(at(begin, s + 1), first, length) - first};
}
// The sequence that step t of batch row b belongs to.
__device__ inline Sequence sequence_at(const Indices& begin, int64_t b, int64_t t, int64_t length) {
  if (!begin.data) return {b, b, 0, length};
  int64_t low = 0, high = begin.count - 2;  // the last that begins at t or before
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (at(begin, middle) <= t) low = middle;
    else high = middle - 1;
  }
  const int64_t first = clamped(at(begin, low), 0, t);
  return {low, 0, first, clamped(at(begin, low + 1), t + 1, length) - first};
}
inline int64_t sequences_of(const Indices& begin, int64_t batch) {
  return begin.data ? begin.count - 1 : batch;
}

// --- Functions --------------------------------------------------------------------------------------

constexpr float kLog2e = 1.44269504088896340736f;

// 2^x: one instruction, relative error 2^-22, 1 at 0.
__device__ inline float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline float divide_fast(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

__device__ inline float sigmoid(float x) { return divide_fast(1.0f, 1.0f + expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}
// log(1 + e^x), which is x from 17 on.
__device__ inline float softplus(float x) {
  return (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x)));  // keeps NaN
}

// --- Real and complex numbers -----------------------------------------------------------------------

struct Real {
  static constexpr int kParts = 1;
  float re;
};
struct Complex {
  static constexpr int kParts = 2;
  float re, im;
};

__device__ inline Real number(float re, float, Real) { return {re}; }
__device__ inline Complex number(float re, float im, Complex) { return {re, im}; }
__device__ inline Real operator+(Real a, Real b) { return {a.re + b.re}; }
__device__ inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ inline Real operator*(Real a, Real b) { return {a.re * b.re}; }
__device__ inline Complex operator*(Complex a, Complex b) {
  return {fmaf(a.re, b.re, -(a.im * b.im)), fmaf(a.re, b.im, a.im * b.re)};
}
__device__ inline Real scaled(float x, Real a) { return {x * a.re}; }
__device__ inline Complex scaled(float x, Complex a) { return {x * a.re, x * a.im}; }
__device__ inline Real conj(Real a) { return a; }
__device__ inline Complex conj(Complex a) { return {a.re, -a.im}; }
// a b + c, x a + c for a real x, and c + Re(a b), c + Re(a conj(b)).
__device__ inline Real multiply_add(Real a, Real b, Real c) { return {fmaf(a.re, b.re, c.re)}; }
__device__ inline Complex multiply_add(Complex a, Complex b, Complex c) {
  return {fmaf(a.re, b.re, fmaf(-a.im, b.im, c.re)), fmaf(a.re, b.im, fmaf(a.im, b.re, c.im))};
}
__device__ inline Real add_scaled(float x, Real a, Real c) { return {fmaf(x, a.re, c.re)}; }
__device__ inline Complex add_scaled(float x, Complex a, Complex c) {
  return {fmaf(x, a.re, c.re), fmaf(x, a.im, c.im)};
}
__device__ inline float add_product(Real a, Real b, float c) { return fmaf(a.re, b.re, c); }
__device__ inline float add_product(Complex a, Complex b, float c) {
  return fmaf(-a.im, b.im, fmaf(a.re, b.re, c));
}
__device__ inline float add_inner(Real a, Real b, float c) { return fmaf(a.re, b.re, c); }
__device__ inline float add_inner(Complex a, Complex b, float c) {
  return fmaf(a.im, b.im, fmaf(a.re, b.re, c));
}
// c + Re(a conj(rate)), where the real part of the rate is in units of log2.
constexpr float kLn2 = 0.69314718055994530942f;
__device__ inline float add_rate(Real a, Real rate, float c) {
  return fmaf(a.re, rate.re * kLn2, c);
}
__device__ inline float add_rate(Complex a, Complex rate, float c) {
  return fmaf(a.im, rate.im, fmaf(a.re, rate.re * kLn2, c));
}
__device__ inline bool is_zero(Real a) { return a.re == 0.0f; }
__device__ inline bool is_zero(Complex a) { return a.re == 0.0f && a.im == 0.0f; }

// 2^re and 2^re (cos im + i sin im): e to a number whose real part is in units of log2.
__device__ inline Real exp2_of(Real x) { return {exp2_fast(x.re)}; }
__device__ inline Complex exp2_of(Complex x) {
  float sine, cosine;
  const float size = exp2_fast(x.re);
  sincosf(x.im, &sine, &cosine);
  return {size * cosine, size * sine};
}
__device__ inline Real exp_of(Real x) { return {expf(x.re)}; }
__device__ inline Complex exp_of(Complex x) {
  float sine, cosine;
  const float size = expf(x.re);
  sincosf(x.im, &sine, &cosine);
  return {size * cosine, size * sine};
}

// A number whose parts lie `part` apart.
template <class N>
__device__ N read_number(const void* data, DType dtype, int64_t i, int64_t part) {
  const float re = read(data, dtype, i);
  return number(re, N::kParts > 1 ? read(data, dtype, i + part) : 0.0f, N{});
}
__device__ inline void write_number(void* data, DType dtype, int64_t i, int64_t, Real x) {
  write(data, dtype, i, x.re);
}
__device__ inline void write_number(void* data, DType dtype, int64_t i, int64_t part, Complex x) {
  write(data, dtype, i, x.re);
  write(data, dtype, i + part, x.im);
}

}  // namespace pentad::scan::cuda
