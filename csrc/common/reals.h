// SPDX-License-Identifier: Apache-2.0
// One real number of any float dtype, to and from double, exactly rounded: for the definitions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/tensor_view.h"

namespace pentad {

inline double real_from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double x;
  if (exponent == 31) x = fraction ? NAN : std::numeric_limits<double>::infinity();
  else if (exponent) x = std::ldexp(1024 + fraction, exponent - 25);
  else x = std::ldexp(fraction, -24);
  return bits >> 15 ? -x : x;
}

// A finite float16, faster: a product rebiases the exponent and normalises what was subnormal.
inline float finite_half(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &wide, 4);
  x *= 0x1p112f;
  return bits >> 15 ? -x : x;
}

inline double real_from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// To the nearest number, ties to even, of a 16-bit format: `fraction` bits behind the point, and
// the exponent of its least normal number. One rounding: by way of float there would be two.
inline uint16_t real_to_16_bits(double x, int fraction, int least_exponent) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = (3 - 2 * least_exponent) << fraction;
  if (std::isnan(x)) return static_cast<uint16_t>(infinity | 1 << (fraction - 1));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = x == 0 ? least_exponent : std::max(std::ilogb(x), least_exponent);
  if (exponent > 1 - least_exponent) return static_cast<uint16_t>(sign | infinity);
  // A mantissa rounded up to the next power of two carries into the exponent, as it should.
  const int mantissa =
      static_cast<int>(std::nearbyint(std::ldexp(std::abs(x), fraction - exponent)));
  const int bits = ((exponent - least_exponent) << fraction) + mantissa;
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

inline double read_real(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::bf16: return real_from_bf16(static_cast<const uint16_t*>(data)[i]);
    case DType::f16: return real_from_half(static_cast<const uint16_t*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

inline void write_real(void* data, DType dtype, int64_t i, double x) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[i] = x; break;
    case DType::bf16: static_cast<uint16_t*>(data)[i] = real_to_16_bits(x, 7, -126); break;
    case DType::f16: static_cast<uint16_t*>(data)[i] = real_to_16_bits(x, 10, -14); break;
    default: static_cast<float*>(data)[i] = static_cast<float>(x);
  }
}

}  // namespace pentad
