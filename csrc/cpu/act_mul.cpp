#include "../act_mul.h"

#include <torch/csrc/stable/library.h>

#include "clones.h"
#include "parallel.h"

namespace s2ft {
namespace {

// target_clones needs plain functions, so there is one per type and activation.
#define S2FT_SPANS(T, Act)                                                                                       \
  S2FT_CLONES S2FT_FUSED void forward(Act, const T* gate, const T* up, T* out, int64_t n) {                      \
    for (int64_t i = 0; i < n; ++i) out[i] = act_mul_of<Act>(gate[i], up[i]);                                    \
  }                                                                                                              \
  S2FT_CLONES S2FT_FUSED void backward(Act, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, \
                                       int64_t n) {                                                              \
    for (int64_t i = 0; i < n; ++i) act_mul_gradients<Act>(grad[i], gate[i], up[i], grad_gate + i, grad_up + i); \
  }
#define S2FT_WIDE_SPANS(name, Act) S2FT_SPANS(float, Act) S2FT_SPANS(BFloat16, Act)
#define S2FT_HALF_SPANS(name, Act) S2FT_SPANS(Half, Act)
S2FT_ACTIVATIONS(S2FT_WIDE_SPANS)
S2FT_ACTIVATIONS_IN_HALF(S2FT_HALF_SPANS)
#undef S2FT_HALF_SPANS
#undef S2FT_WIDE_SPANS
#undef S2FT_SPANS

template <class Act>
constexpr bool in_half = false;
#define S2FT_IN_HALF(name, Act) \
  template <>                   \
  constexpr bool in_half<Act> = true;
S2FT_ACTIVATIONS_IN_HALF(S2FT_IN_HALF)
#undef S2FT_IN_HALF

template <class Act>
void forward(Act, const double* gate, const double* up, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = act_mul_of<Act>(gate[i], up[i]);
}

template <class Act>
void backward(Act, const double* grad, const double* gate, const double* up, double* grad_gate, double* grad_up,
              int64_t n) {
  for (int64_t i = 0; i < n; ++i) act_mul_gradients<Act>(grad[i], gate[i], up[i], grad_gate + i, grad_up + i);
}

// Calls f(Act{}, Tag<T>{}, first, n) for every share of the elements, on PyTorch's threads.
template <class F>
void for_shares(Activation activation, const ActMulData& data, const F& f) {
  constexpr int64_t line = 4096;
  constexpr int64_t work = line * 8;  // an element costs more here than one that is only moved
  visit(activation, [&](auto act) {
    const auto shares = [&](auto tag) {
      parallel_lines((data.size + line - 1) / line, work, [&](int64_t begin, int64_t end) {
        f(act, tag, begin * line, std::min(data.size, end * line) - begin * line);
      });
    };
    if (data.dtype == DType::f32) return shares(Tag<float>{});
    if (data.dtype == DType::f64) return shares(Tag<double>{});
    if (data.dtype == DType::bf16) return shares(Tag<BFloat16>{});
    if constexpr (in_half<decltype(act)>) shares(Tag<Half>{});
  });
}

template <class T>
const T* from(const void* pointer, int64_t first) {
  return static_cast<const T*>(pointer) + first;
}

template <class T>
T* from(void* pointer, int64_t first) {
  return static_cast<T*>(pointer) + first;
}

// Calls f(first, gate, up, n) for every run of elements without a gap, of n elements from `first` on.
template <class T, class F>
void for_rows(const ActMulData& data, int64_t first, int64_t n, const F& f) {
  while (n > 0) {
    const int64_t run = std::min(n, data.columns - first % data.columns);
    f(first, from<T>(data.gate, in_rows(first, data.columns, data.gate_row)),
      from<T>(data.up, in_rows(first, data.columns, data.up_row)), run);
    first += run;
    n -= run;
  }
}

struct CpuActMul {
  explicit CpuActMul(const Tensor&) {}

  // PyTorch is faster in float16: it converts by instructions that gcc 12 does not use in a loop. relu is computed here
  // all the same, because PyTorch's relu backward takes a Scalar, for which the stable ABI has no type.
  static bool computes(Activation activation, DType dtype) {
    bool computed = dtype != DType::f16;
    visit(activation, [&](auto act) { computed |= in_half<decltype(act)>; });
    return computed;
  }

  void act_mul(Activation activation, const ActMulData& data) const {
    for_shares(activation, data, [&](auto act, auto tag, int64_t first, int64_t n) {
      using T = typename decltype(tag)::type;
      for_rows<T>(data, first, n, [&](int64_t i, const T* gate, const T* up, int64_t run) {
        forward(act, gate, up, from<T>(data.out, i), run);
      });
    });
  }

  void act_mul_backward(Activation activation, const ActMulData& data) const {
    for_shares(activation, data, [&](auto act, auto tag, int64_t first, int64_t n) {
      using T = typename decltype(tag)::type;
      for_rows<T>(data, first, n, [&](int64_t i, const T* gate, const T* up, int64_t run) {
        backward(act, from<T>(data.grad, i), gate, up, from<T>(data.grad_gate, i), from<T>(data.grad_up, i), run);
      });
    });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) {
  m.impl("act_mul", TORCH_BOX(&s2ft::act_mul<s2ft::CpuActMul>));
  m.impl("act_mul_backward", TORCH_BOX(&s2ft::act_mul_backward<s2ft::CpuActMul>));
}
