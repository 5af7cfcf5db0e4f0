// What the kernels should compute, in loops on the host that share no arithmetic with csrc: conversions, rounding and
// activations are written anew from their definitions.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cuda/launch.h"

namespace host {

using s2ft::BFloat16;
using s2ft::Half;

// Binary digits of the mantissa, and the exponent of the smallest step between two numbers.
template <class T>
struct Format;
template <>
struct Format<double> {
  static constexpr int digits = 53, least = -1074;
  static constexpr s2ft::DType dtype = s2ft::DType::f64;
};
template <>
struct Format<float> {
  static constexpr int digits = 24, least = -149;
  static constexpr s2ft::DType dtype = s2ft::DType::f32;
};
template <>
struct Format<Half> {
  static constexpr int digits = 11, least = -24;
  static constexpr s2ft::DType dtype = s2ft::DType::f16;
};
template <>
struct Format<BFloat16> {
  static constexpr int digits = 8, least = -133;
  static constexpr s2ft::DType dtype = s2ft::DType::bf16;
};

inline double value(double x) { return x; }
inline double value(float x) { return x; }
inline double value(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline double value(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const double size = exponent == 31
                          ? (mantissa ? std::nan("") : HUGE_VAL)
                          : std::ldexp(exponent ? mantissa + 1024 : mantissa, exponent ? exponent - 25 : -24);
  return x.bits & 0x8000 ? -size : size;
}

// The distance between the numbers of a type around x.
template <class T>
double step(double x) {
  const int exponent = x == 0 ? Format<T>::least : std::ilogb(x) - Format<T>::digits + 1;
  return std::ldexp(1.0, std::max(exponent, Format<T>::least));
}

// x rounded to the numbers of a type, ties to even. The numbers of the driver do not overflow.
template <class T>
double rounded(double x) {
  const double unit = step<T>(x);
  return std::nearbyint(x / unit) * unit;
}

// base + delta, summed in the wider type (float at least) and rounded once to the type of the base.
template <class W, class D>
double sum(W base, D delta) {
  constexpr bool wide = std::is_same_v<W, double> || std::is_same_v<D, double>;
  const double exact = value(base) + value(delta), summed = wide ? exact : rounded<float>(exact);
  return rounded<W>(sizeof(W) == 2 ? rounded<float>(summed) : summed);
}

inline std::mt19937& random_numbers() {
  static std::mt19937 generator(0);
  return generator;
}

template <class T>
T stored(double x) {
  if constexpr (sizeof(T) > 2) {
    return static_cast<T>(x);
  } else {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    double size = std::abs(rounded<T>(x));
    constexpr int digits = Format<T>::digits - 1, bias = std::is_same_v<T, Half> ? 15 : 127;
    if (size < std::ldexp(1.0, 1 - bias))
      return T{static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(size, -Format<T>::least)))};
    const int exponent = std::ilogb(size);
    const auto mantissa = static_cast<uint16_t>(std::ldexp(size, digits - exponent) - std::ldexp(1.0, digits));
    return T{static_cast<uint16_t>(sign | (exponent + bias) << digits | mantissa)};
  }
}

// Normal numbers. Only the first ones are drawn, because that is slow; their number is a prime, so that rows differ.
template <class T>
std::vector<T> normal(size_t size) {
  constexpr size_t drawn = 65521;
  std::normal_distribution<double> draw;
  std::vector<T> values(size);
  for (size_t i = 0; i < size; ++i) values[i] = i < drawn ? stored<T>(draw(random_numbers())) : values[i - drawn];
  return values;
}

// An activation and its derivative. Every row of S2FT_ACTIVATIONS needs one here, or the driver does not compile.
struct Gate {
  double act, derivative;
};
inline Gate silu(double g) {
  const double s = 1 / (1 + std::exp(-g));
  return {g * s, s + g * s * (1 - s)};
}
inline Gate gelu(double g) {
  const double cdf = 0.5 * std::erfc(-g / std::sqrt(2.0));
  return {g * cdf, cdf + g * std::exp(-g * g / 2) / std::sqrt(2 * std::acos(-1.0))};
}
inline Gate gelu_tanh(double g) {
  const double c = std::sqrt(2 / std::acos(-1.0)), t = std::tanh(c * (g + 0.044715 * g * g * g));
  return {0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * 0.044715 * g * g)};
}
inline Gate relu(double g) { return {g > 0 ? g : 0, g > 0 ? 1.0 : 0.0}; }

inline Gate gate_of(s2ft::Activation activation, double g) {
  switch (activation) {
#define S2FT_CASE(name, Act)   \
  case s2ft::Activation::name: \
    return name(g);
    S2FT_ACTIVATIONS(S2FT_CASE)
#undef S2FT_CASE
  }
  return {};
}

}  // namespace host
