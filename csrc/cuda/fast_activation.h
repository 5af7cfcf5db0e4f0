// The activations for 16-bit tensors on a GPU, by its approximate exponential and reciprocal. In float32 arithmetic
// without them act_mul would be bound by instructions and not by memory.
//
// Whatever errors the two instructions make within their bounds, act(gate) and act'(gate) are the exact value rounded,
// or its neighbour, if it is at least 2^-120. At most 50 of the 65,536 gates give the neighbour. The only exception is
// one gate of gelu in float16, -0.752, where the slope crosses 0 and may be two numbers away.
// tests/cuda_on_cpu/test_cuda_fast_activation.py checks this for all gates. A result below 2^-120 may be 0.
//
// Infinities, NaN and overflow give the results of PyTorch.
#pragma once

#include "../core/activation.h"
#include "pairs.h"

namespace s2ft::cuda {

constexpr float kLog2E = 1.44269504f;

// An activation that has no faster form.
template <class Act>
struct Fast {
  __device__ static float value(float g) { return Act::value(g); }
  __device__ static float gradient(float d, float g, float* value) { return Act::gradient(d, g, value); }
};

// g / (1 + e^-x) and what its gradient needs. The reciprocal is taken of a quarter, because the reciprocal of a number
// above 2^126 is subnormal: with gates from -88.7 to -87.4 the result would be 0.
struct Gated {
  float e, four;  // e^-x, and 4 / (1 + e^-x)
  float value;

  __device__ Gated(float g, float exponent)  // exponent = -x / ln 2
      : e(approximate_exp2(exponent)), four(approximate_reciprocal(0.25f * e + 0.25f)), value(0.25f * g * four) {}

  __device__ float weight() const { return 0.25f * four; }  // 1 / (1 + e^-x)
  // g (1 - weight). A difference from 1 would have no correct digits for large x. The bound keeps inf * 0 out, which
  // PyTorch's formula does not have. A NaN is also in `value`.
  __device__ float rest() const { return fminf(e, 3.40282347e38f) * value; }
};

template <>
struct Fast<Silu> {
  __device__ static float value(float g) { return Gated(g, -kLog2E * g).value; }

  __device__ static float gradient(float d, float g, float* value) {
    const Gated a(g, -kLog2E * g);
    *value = a.value;
    return d * a.weight() * (1.0f + a.rest());
  }
};

template <>
struct Fast<GeluTanh> {
  // -2u / ln 2, see GeluTanh. `square` is g^2.
  __device__ static float exponent(float g, float square) {
    constexpr float linear = -1.5957691216f * kLog2E, cubic = linear * 0.044715f;
    return g * (linear + cubic * square);
  }

  __device__ static float value(float g) { return Gated(g, exponent(g, g * g)).value; }

  __device__ static float gradient(float d, float g, float* value) {
    const float square = g * g;
    const Gated a(g, exponent(g, square));
    *value = a.value;
    return d * a.weight() * (1.0f + a.rest() * (1.5957691216f + (1.5957691216f * 3 * 0.044715f) * square));
  }
};

template <>
struct Fast<Gelu> {
  // See normal() for the approximation. Its bounds are not needed: for large |g| both approximations are 0.
  __device__ static Normal<float> normal_of(float g) {
    const float a = fabsf(g);
    const float e = approximate_exp2((-0.5f * kLog2E * a) * a);
    const float t = approximate_reciprocal(1.0f + 0.34f * a);
    const float tail = e * normal_tail(t);
    return {g < 0.0f ? tail : 1.0f - tail, e * 0.398942280f};
  }

  __device__ static float value(float g) { return g * normal_of(g).cdf; }

  __device__ static float gradient(float d, float g, float* value) {
    const Normal<float> n = normal_of(g);
    *value = g * n.cdf;
    return d * (n.cdf + g * n.density);
  }
};

using s2ft::act_mul_gradients;  // of single elements
using s2ft::act_mul_of;

// act(gate) * up for two neighbours. The roundings are those of act_mul_of.
template <class Act, class T>
__device__ __forceinline__ Pair<T> act_mul_of(Pair<T> gate, Pair<T> up) {
  const Floats g = widen(gate);
  return product(rounded_pair<T>({Fast<Act>::value(g.first), Fast<Act>::value(g.second)}), up);
}

template <class Act, class T>
__device__ __forceinline__ void act_mul_gradients(Pair<T> grad, Pair<T> gate, Pair<T> up, Pair<T>* grad_gate,
                                                  Pair<T>* grad_up) {
  const Floats d = widen(product(grad, up)), g = widen(gate);
  Floats value;
  const float first = Fast<Act>::gradient(d.first, g.first, &value.first);
  const float second = Fast<Act>::gradient(d.second, g.second, &value.second);
  *grad_gate = rounded_pair<T>({first, second});
  *grad_up = product(grad, rounded_pair<T>(value));
}

}  // namespace s2ft::cuda
