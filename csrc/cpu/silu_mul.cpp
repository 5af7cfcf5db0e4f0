// silu(gate) * up and its gradients, each in one pass over memory.
//
// Rounding follows PyTorch's own sequence of operators: silu(gate) is rounded to the tensors' type
// before it is multiplied, so that a model gives the same numbers with the op and without.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../aten.h"
#include "../checks.h"
#include "../core/numeric.h"
#include "parallel.h"

// Compiled several times and picked when the module loads, by what the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define S2FT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2FT_CLONES
#endif
#define S2FT_INLINE inline __attribute__((always_inline))

namespace s2ft {
namespace {

// e^x within 2 units in the last place, in operations that vectorise. x = n ln 2 + r, |r| <= ln 2 / 2.
S2FT_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;  // where 2^n is infinity already, so that sigmoid(-x) is 0
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, and the low bits are that integer
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * r * r + r + 1.0f;
  // Not a cast of n, which is undefined for NaN. For NaN the mantissa is one, whatever this power of two is.
  return mantissa * bits_as<float>((bits_as<uint32_t>(shifted) + 127u) << 23);
}

S2FT_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T>
S2FT_INLINE float rounded(float value) {
  return widen(Narrow<T>::from(value));
}

template <class T>
S2FT_INLINE void forward_span(const T* gate, const T* up, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen(gate[i]);
    out[i] = Narrow<T>::from(rounded<T>(g * sigmoid(g)) * widen(up[i]));
  }
}

template <class T>
S2FT_INLINE void backward_span(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen(gate[i]), d = widen(grad[i]);
    const float s = sigmoid(g);
    grad_up[i] = Narrow<T>::from(d * rounded<T>(g * s));
    grad_gate[i] = Narrow<T>::from(rounded<T>(d * widen(up[i])) * (s * (1.0f + g * (1.0f - s))));
  }
}

// target_clones wants plain functions, one for each type.
#define S2FT_SPANS(T)                                                                            \
  S2FT_CLONES void forward(const T* gate, const T* up, T* out, int64_t n) {                      \
    forward_span(gate, up, out, n);                                                              \
  }                                                                                              \
  S2FT_CLONES void backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, \
                            int64_t n) {                                                         \
    backward_span(grad, gate, up, grad_gate, grad_up, n);                                        \
  }
S2FT_SPANS(float)
S2FT_SPANS(BFloat16)
#undef S2FT_SPANS

// float16 is left to PyTorch's operators, since its conversions don't vectorise here, and so is float64.
bool has_kernel(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

template <class F>
void visit_kernel(DType dtype, F&& f) {
  dtype == DType::f32 ? f(Tag<float>{}) : f(Tag<BFloat16>{});
}

constexpr int64_t kLine = 4096;  // elements handed out at once; they are computed on, not just moved

template <class F>
void parallel_elements(int64_t total, const F& f) {
  parallel_lines((total + kLine - 1) / kLine, kLine * 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLine;
    f(first, std::min(total, end * kLine) - first);
  });
}

DType check_pair(const Tensor& gate, const Tensor& other, const char* op, const char* name) {
  const DType dtype = dtype_of(gate, op, "gate");
  require(other.scalar_type() == gate.scalar_type(), op, name, " must have gate's dtype");
  bool same = other.dim() == gate.dim();
  for (int64_t d = 0; same && d < gate.dim(); ++d) same = other.size(d) == gate.size(d);
  require(same, op, name, " must have gate's shape ", shape_of(gate), ", got ", shape_of(other));
  return dtype;
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  const DType dtype = check_pair(gate, up, "silu_mul", "up");
  if (!has_kernel(dtype)) return torch::stable::contiguous(aten::mul(aten::silu(gate), up));
  const Tensor g = torch::stable::contiguous(gate), u = torch::stable::contiguous(up);
  Tensor out = torch::stable::new_empty(g, g.sizes());
  visit_kernel(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *gp = static_cast<const T*>(g.const_data_ptr()), *up_ = static_cast<const T*>(u.const_data_ptr());
    T* op = static_cast<T*>(out.mutable_data_ptr());
    parallel_elements(g.numel(), [&](int64_t at, int64_t n) { forward(gp + at, up_ + at, op + at, n); });
  });
  return out;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const DType dtype = check_pair(gate, up, "silu_mul_backward", "up");
  check_pair(gate, grad, "silu_mul_backward", "grad");
  if (!has_kernel(dtype))
    return {torch::stable::contiguous(aten::silu_backward(aten::mul(grad, up), gate)),
            torch::stable::contiguous(aten::mul(grad, aten::silu(gate)))};
  const Tensor d = torch::stable::contiguous(grad), g = torch::stable::contiguous(gate),
               u = torch::stable::contiguous(up);
  Tensor grad_gate = torch::stable::new_empty(g, g.sizes()), grad_up = torch::stable::new_empty(g, g.sizes());
  visit_kernel(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *dp = static_cast<const T*>(d.const_data_ptr()), *gp = static_cast<const T*>(g.const_data_ptr()),
            *up_ = static_cast<const T*>(u.const_data_ptr());
    T *dg = static_cast<T*>(grad_gate.mutable_data_ptr()), *du = static_cast<T*>(grad_up.mutable_data_ptr());
    parallel_elements(g.numel(), [&](int64_t at, int64_t n) {
      backward(dp + at, gp + at, up_ + at, dg + at, du + at, n);
    });
  });
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&s2ft::silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&s2ft::silu_mul_backward));
}
