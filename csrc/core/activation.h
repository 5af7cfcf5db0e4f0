// The activations of a gated FFN: act(gate) * up and its gradients, element by element.
//
// float uses plain arithmetic without library calls, so that a CPU can vectorise it and every device computes the same.
// double calls the C library. Infinities, NaN and overflow give the results of PyTorch.
#pragma once

#include <cmath>

#include "numeric.h"

namespace s2ft {

// All activations, as X(name, struct). A new one is a struct below and a row in one of the two lists.
// In float16 the CPU computes those of the second list; for those of the first, PyTorch's operators are faster.
#define S2FT_ACTIVATIONS_OF_PYTORCH(X) X(silu, Silu) X(gelu, Gelu) X(gelu_tanh, GeluTanh)
#define S2FT_ACTIVATIONS_IN_HALF(X) X(relu, Relu)
#define S2FT_ACTIVATIONS(X) S2FT_ACTIVATIONS_OF_PYTORCH(X) S2FT_ACTIVATIONS_IN_HALF(X)

#define S2FT_NAME(name, Act) name,
enum class Activation : int { S2FT_ACTIVATIONS(S2FT_NAME) };
#undef S2FT_NAME

// Bounds are integer minima and maxima, because compilers turn a comparison of floats into branches and compile the
// rest of the loop once per branch. The bound loses NaN, so the caller must pass NaN on by another operand.
S2FT_HD float bounded_magnitude(float x, float bound) {
  const int32_t bits = bits_as<int32_t>(x) & 0x7fffffff, limit = bits_as<int32_t>(bound);
  return bits_as<float>(bits < limit ? bits : limit);
}

// e^(x + rest) for -100 <= x <= 89, where `rest` holds low digits that do not fit into x. The error is at most 2 units
// in the last place. The result is 0 below -86.99 and infinity above 88.72. x + rest = n ln 2 + r, |r| <= ln 2 / 2.
S2FT_HD float bounded_exponential(float x, float rest) {
  // Adding 1.5 * 2^23 rounds to an integer. Adding 126 more gives n + 126 in the lowest bits.
  const float zero = 12582912.0f, shift = 12583038.0f;
  const float shifted = (x + rest) * 1.44269504f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0.693359375f) + (n * 2.12194440e-4f + rest);
  // 2 e^r,
  float p = 2 * 1.9875691500e-4f;
  p = p * r + 2 * 1.3981999507e-3f;
  p = p * r + 2 * 8.3334519073e-3f;
  p = p * r + 2 * 4.1665795894e-2f;
  p = p * r + 2 * 1.6666665459e-1f;
  p = p * r + 2 * 5.0000001201e-1f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  // times 2^n / 2, which is a float even for the largest n, and 0 for the smallest.
  const int32_t bits = bits_as<int32_t>(shifted), least = bits_as<int32_t>(zero);
  const uint32_t exponent = static_cast<uint32_t>(bits < least ? least : bits) << 23;
  return p * bits_as<float>(exponent);
}

S2FT_HD float exponential(float x) {
  const int32_t sign = bits_as<int32_t>(x) & INT32_MIN;
  return bounded_exponential(bits_as<float>(sign | bits_as<int32_t>(bounded_magnitude(x, 89.0f))), 0.0f);
}

S2FT_HD double exponential(double x) { return std::exp(x); }

// Phi(x) and Phi'(x) of the standard normal distribution.
template <class A>
struct Normal {
  A cdf, density;
};

// Phi(-a) = e^(-a^2/2) t P(t), t = 1 / (1 + 0.34 a), for a >= 0. This keeps the digits of the lower tail, which 1 + erf
// would cancel, and shares its exponential with the density. P is a polynomial of degree 8, fitted to e^(a^2/2) Phi(-a)
// / t over a <= 13.2. The fit minimises the squared relative error at 600 Chebyshev points in t, reweighted by the
// error until the largest errors were equal (Lawson's method), 2.4e-8. 0.34 was the best of the values tried. In float
// arithmetic the relative error of Phi is at most 4e-7.
S2FT_HD float normal_tail(float t) {  // t P(t)
  float p = -2.65232132e-02f;
  p = p * t + 1.41391639e-01f;
  p = p * t - 2.76895516e-01f;
  p = p * t + 2.06306691e-01f;
  p = p * t - 4.74343055e-02f;
  p = p * t + 1.16456034e-01f;
  p = p * t + 1.14933150e-01f;
  p = p * t + 1.36146927e-01f;
  p = p * t + 1.35618606e-01f;
  return p * t;
}

S2FT_HD Normal<float> normal(float x) {
  const float a = bounded_magnitude(x, 14.0f);  // from 13.2 on the exponential is 0
  // The square is computed in two parts, and the first is exact. One rounded square would give the exponential a
  // relative error of 4e-6.
  const float high = bits_as<float>(bits_as<uint32_t>(a) & 0xfffff000u);
  const float e = bounded_exponential(-0.5f * high * high, -0.5f * (a - high) * (a + high));
  const float t = 1.0f / (1.0f + 0.34f * a);
  const float tail = e * normal_tail(t);
  const uint32_t cdf = choose(x < 0.0f, bits_as<uint32_t>(tail), bits_as<uint32_t>(1.0f - tail));
  return {bits_as<float>(cdf), e * 0.398942280f};
}

S2FT_HD Normal<double> normal(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752), std::exp(-0.5 * x * x) * 0.39894228040143268};
}

// Each activation has value(g) = act(g) and gradient(d, g, &value) = d act'(g), which also stores act(g) in `value`.

struct Silu {
  template <class A>
  S2FT_HD static A value(A g) {
    return g / (A(1) + exponential(-g));
  }

  template <class A>
  S2FT_HD static A gradient(A d, A g, A* value) {
    const A below = A(1) + exponential(-g);
    const A s = A(1) / below;
    *value = g / below;
    return d * s * (A(1) + g * (A(1) - s));
  }
};

struct Gelu {
  template <class A>
  S2FT_HD static A value(A g) {
    return g * normal(g).cdf;
  }

  template <class A>
  S2FT_HD static A gradient(A d, A g, A* value) {
    const Normal<A> n = normal(g);
    *value = g * n.cdf;
    return d * (n.cdf + g * n.density);
  }
};

// 0.5 g (1 + tanh u) = g sigmoid(2u), u = sqrt(2 / pi) (g + 0.044715 g^3).
struct GeluTanh {
  template <class A>
  S2FT_HD static A weight(A g) {
    return A(1) / (A(1) + exponential(A(-1.5957691216057308) * (g + A(0.044715) * g * g * g)));
  }

  template <class A>
  S2FT_HD static A value(A g) {
    return g * weight(g);
  }

  template <class A>
  S2FT_HD static A gradient(A d, A g, A* value) {
    const A s = weight(g);
    *value = g * s;
    return d * (s + g * s * (A(1) - s) * (A(1.5957691216057308) * (A(1) + A(3 * 0.044715) * (g * g))));
  }
};

struct Relu {
  // v if g > 0 or NaN, else 0. It uses a mask, because compilers turn a select into a branch around the code after it.
  template <class A>
  S2FT_HD static A passed(A g, A v) {
    using B = typename Bits<sizeof(A)>::type;
    return bits_as<A>(static_cast<B>(bits_as<B>(v) & (B(0) - static_cast<B>(!(g <= A(0))))));
  }

  template <class A>
  S2FT_HD static A value(A g) {
    return passed(g, g);
  }

  template <class A>
  S2FT_HD static A gradient(A d, A g, A* value) {
    *value = passed(g, g);
    return passed(g, d);
  }
};

// Calls f with the struct of the activation, such as f(Silu{}).
template <class F>
void visit(Activation activation, F&& f) {
  switch (activation) {
#define S2FT_CASE(name, Act) \
  case Activation::name:     \
    return f(Act{});
    S2FT_ACTIVATIONS(S2FT_CASE)
#undef S2FT_CASE
  }
}

// Rounding follows PyTorch's sequence of operators: act(gate), and grad * up in the gradient, are rounded to the
// tensors' type. A model therefore gives the same numbers with and without the op.
template <class T, class A>
S2FT_HD A rounded(A value) {
  return widen(Narrow<T>::from(value));
}

template <class Act, class T>
S2FT_HD T act_mul_of(T gate, T up) {
  return Narrow<T>::from(rounded<T>(Act::value(widen(gate))) * widen(up));
}

template <class Act, class T>
S2FT_HD void act_mul_gradients(T grad, T gate, T up, T* grad_gate, T* grad_up) {
  const auto d = widen(grad), g = widen(gate);
  auto value = d;
  *grad_gate = Narrow<T>::from(Act::gradient(rounded<T>(d * widen(up)), g, &value));
  *grad_up = Narrow<T>::from(d * rounded<T>(value));
}

// The tensors of one call, of one type. The call computes out = act(gate) * up, or the gradients. They are dense, but
// rows of gate and up may have gaps between them, as have the halves of one product. Dense tensors are one row.
struct ActMulData {
  DType dtype;
  int64_t size;
  int64_t columns;           // elements of a row
  int64_t gate_row, up_row;  // elements from the start of a row to that of the next
  const void *gate, *up;
  void* out;  // of the forward

  const void* grad;  // of the backward
  void *grad_gate, *grad_up;
};

// Where element i of a tensor with gaps between its rows is.
S2FT_HD int64_t in_rows(int64_t i, int64_t columns, int64_t row) {
  return i < columns ? i : i / columns * row + i % columns;
}

}  // namespace s2ft
