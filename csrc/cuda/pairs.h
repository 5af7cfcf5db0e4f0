// Two neighbours of a 16-bit tensor in one 32-bit register, and the instructions of a GPU that handle both at once.
//
// A GPU without such an instruction (7.5 for bfloat16), and the tests on the CPU, compute the same function by the
// conversions of core/numeric.h. The approximations have a bound of their relative error, which the tests apply in both
// directions.
#pragma once

#include "../core/numeric.h"
#include "platform.h"

#if defined(S2FT_CUDA_ON_CPU)
#define S2FT_PTX(architecture) 0
#elif defined(__CUDA_ARCH__)
#define S2FT_PTX(architecture) (__CUDA_ARCH__ >= (architecture))
#else  // nvcc's pass for the host, which compiles no body of a kernel
#define S2FT_PTX(architecture) 1
#endif

namespace s2ft {

// The first element is in the low half.
template <class T>
struct Pair {
  uint32_t bits;
};

struct Floats {
  float first, second;
};

template <class T>
__device__ __forceinline__ T first_of(Pair<T> pair) {
  return T{static_cast<uint16_t>(pair.bits)};
}

template <class T>
__device__ __forceinline__ T second_of(Pair<T> pair) {
  return T{static_cast<uint16_t>(pair.bits >> 16)};
}

template <class T>
__device__ __forceinline__ Pair<T> pair_of(T first, T second) {
  return {first.bits | static_cast<uint32_t>(second.bits) << 16};
}

template <class T>
__device__ __forceinline__ Pair<T> pair_of(T first) {
  return {first.bits};
}

__device__ __forceinline__ Floats widen(Pair<BFloat16> p) {
  return {bits_as<float>(p.bits << 16), bits_as<float>(p.bits & 0xffff0000u)};
}

__device__ __forceinline__ Floats widen(Pair<Half> p) {
#if S2FT_PTX(530)
  Floats f;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(f.first), "=f"(f.second)
      : "r"(p.bits));
  return f;
#else
  return {widen(first_of(p)), widen(second_of(p))};
#endif
}

// Both numbers, rounded to the nearest, ties to even.
template <class T>
__device__ __forceinline__ Pair<T> rounded_pair(Floats f);

template <>
__device__ __forceinline__ Pair<BFloat16> rounded_pair<BFloat16>(Floats f) {
#if S2FT_PTX(800)
  Pair<BFloat16> p;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(p.bits) : "f"(f.first), "f"(f.second));
  return p;
#else
  return pair_of(Narrow<BFloat16>::from(f.first), Narrow<BFloat16>::from(f.second));
#endif
}

template <>
__device__ __forceinline__ Pair<Half> rounded_pair<Half>(Floats f) {
  Pair<Half> p;
#if S2FT_PTX(800)
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(p.bits) : "f"(f.first), "f"(f.second));
#elif S2FT_PTX(530)
  asm("{.reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
      : "=r"(p.bits)
      : "f"(f.first), "f"(f.second));
#else
  p = pair_of(Narrow<Half>::from(f.first), Narrow<Half>::from(f.second));
#endif
  return p;
}

// Both products, each rounded once.
__device__ __forceinline__ Pair<BFloat16> product(Pair<BFloat16> a, Pair<BFloat16> b) {
#if S2FT_PTX(900)
  Pair<BFloat16> p;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(p.bits) : "r"(a.bits), "r"(b.bits));
  return p;
#elif S2FT_PTX(800)  // it has no product of its own. Adding -0 changes nothing, not even a zero's sign.
  Pair<BFloat16> p;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(p.bits) : "r"(a.bits), "r"(b.bits), "r"(0x80008000u));
  return p;
#else
  const Floats x = widen(a), y = widen(b);
  return rounded_pair<BFloat16>({x.first * y.first, x.second * y.second});
#endif
}

__device__ __forceinline__ Pair<Half> product(Pair<Half> a, Pair<Half> b) {
#if S2FT_PTX(530)
  Pair<Half> p;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(p.bits) : "r"(a.bits), "r"(b.bits));
  return p;
#else
  const Floats x = widen(a), y = widen(b);
  return rounded_pair<Half>({x.first * y.first, x.second * y.second});
#endif
}

// 2^x and 1 / x with a relative error of at most 2^-22. The instruction set promises 2^-22 and 2^-23. Subnormal
// arguments and results are zeros, because only then each takes one instruction.
#if defined(S2FT_CUDA_ON_CPU)
inline float approximate_exp2(float x) { return simulator::approximate_exp2(x); }
inline float approximate_reciprocal(float x) { return simulator::approximate_reciprocal(x); }
#else
__device__ __forceinline__ float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

}  // namespace s2ft
