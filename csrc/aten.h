// PyTorch's own operators, through the dispatcher. The matrix products use the same library as F.linear in this
// PyTorch, so results are equal bit for bit.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace s2ft::aten {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call("aten::linear", "", x, weight, bias);
}

inline Tensor matmul(const Tensor& a, const Tensor& b) { return call("aten::matmul", "", a, b); }

inline Tensor type_as(const Tensor& x, const Tensor& other) { return call("aten::type_as", "", x, other); }

inline Tensor mul(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }

inline Tensor silu(const Tensor& x) { return call("aten::silu", "", x); }

inline Tensor silu_backward(const Tensor& grad, const Tensor& x) { return call("aten::silu_backward", "", grad, x); }

// `approximate` is "none" or "tanh". PyTorch 2.13 leaks the few bytes of that string in every such call.
inline Tensor gelu(const Tensor& x, const std::string& approximate) { return call("aten::gelu", "", x, approximate); }

inline Tensor gelu_backward(const Tensor& grad, const Tensor& x, const std::string& approximate) {
  return call("aten::gelu_backward", "", grad, x, approximate);
}

// t itself if it is contiguous. The test costs nothing; the operator call would.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace s2ft::aten
