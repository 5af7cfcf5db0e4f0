// Number types of the kernels, and the sum base + delta.
//
// The same source is compiled for the CPU, by nvcc, and for the CUDA-on-CPU tests, without vendor headers. The two 16-bit
// types are converted by integer arithmetic, or by the instruction of a GPU that has one. Both round to nearest, ties to
// even, so they differ in the bits of a NaN at most.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define S2FT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)  // always_inline, because a loop with a call in it is not vectorised
#define S2FT_HD inline __attribute__((always_inline))
#else
#define S2FT_HD inline
#endif

namespace s2ft {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
S2FT_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// first ? a : b, by masks. Compilers turn that expression into branches, in loops that could be vectorised.
S2FT_HD uint32_t choose(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(first);
  return (a & mask) | (b & ~mask);
}

S2FT_HD float widen(Half h) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  // The shift aligns the mantissas. The exponent biases differ by 112.
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = bits_as<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = choose(magnitude < 0x0400u, subnormal, normal);
  return bits_as<float>(sign | choose(magnitude >= 0x7c00u, special, finite));
#endif
}

S2FT_HD float widen(BFloat16 b) { return bits_as<float>(static_cast<uint32_t>(b.bits) << 16); }
S2FT_HD float widen(float f) { return f; }
S2FT_HD double widen(double d) { return d; }

// Narrow<T>::from(value) rounds to nearest, ties to even. narrow() below converts a double to a 16-bit type through
// float, as a cast in PyTorch does.
template <class T>
struct Narrow {
  template <class A>
  S2FT_HD static T from(A value) {
    return static_cast<T>(value);
  }
};

template <>
struct Narrow<Half> {
  S2FT_HD static Half from(float value) {
#if defined(__CUDA_ARCH__)
    Half h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(value));
    return h;
#else
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the spacing of half is 2^-24, which is the spacing of float at 0.5. Adding 0.5 makes the hardware
    // round to that spacing, and the integer distance from 0.5 is the result.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t result = choose(magnitude < 0x38800000u, subnormal, normal);
    result = choose(magnitude >= 0x477ff000u, 0x7c00u, result);  // 65520 and above round to infinity
    result = choose(magnitude > 0x7f800000u, 0x7e00u, result);   // NaN
    return Half{static_cast<uint16_t>(sign | result)};
#endif
  }
};

template <>
struct Narrow<BFloat16> {
  S2FT_HD static BFloat16 from(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(value));
    return b;
#else
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
  }
};

// The type of a sum: double if one of the two types is double, otherwise float.
template <class W, class D>
using Wide = std::conditional_t<std::is_same_v<W, double> || std::is_same_v<D, double>, double, float>;

// A sum, rounded once to the type of the weight.
template <class W, class A>
S2FT_HD W narrow(A sum) {
  return Narrow<W>::from(static_cast<std::conditional_t<sizeof(W) == 2, float, A>>(sum));
}

// sum + alpha * value with a rounded product, as in PyTorch. Hosts compile with -ffp-contract=off. nvcc would fuse the
// two operations without the intrinsics.
S2FT_HD float plus_product(float sum, float alpha, float value) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(sum, __fmul_rn(alpha, value));
#else
  return sum + alpha * value;
#endif
}
S2FT_HD double plus_product(double sum, double alpha, double value) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(sum, __dmul_rn(alpha, value));
#else
  return sum + alpha * value;
#endif
}

// base + delta, rounded once to the type of the base.
template <class W, class D>
S2FT_HD W add(W base, D delta) {
  using A = Wide<W, D>;
  return narrow<W>(static_cast<A>(widen(base)) + static_cast<A>(widen(delta)));
}

// An integer of a given size. Values moved as such integers keep their NaN payloads.
template <int Size>
struct Bits;
template <>
struct Bits<1> {
  using type = uint8_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint64_t;
};

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the type of `dtype`.
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::f64:
      return f(Tag<double>{});
    case DType::f16:
      return f(Tag<Half>{});
    case DType::bf16:
      return f(Tag<BFloat16>{});
  }
}

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Calls f(Tag<T>{}) with the integer type of `size` bytes. Returns false if there is none.
template <class F>
bool visit_bits(int64_t size, F&& f) {
  switch (size) {
    case 1:
      f(Tag<uint8_t>{});
      return true;
    case 2:
      f(Tag<uint16_t>{});
      return true;
    case 4:
      f(Tag<uint32_t>{});
      return true;
    case 8:
      f(Tag<uint64_t>{});
      return true;
    default:
      return false;
  }
}

}  // namespace s2ft
