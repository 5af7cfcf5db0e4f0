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

// The same values in the same memory, in a tensor that autograd does not take for a view.
inline Tensor not_a_view(const Tensor& t) { return call("aten::_unsafe_view", "", t, t.sizes()); }

inline Tensor matmul(const Tensor& a, const Tensor& b) { return call("aten::matmul", "", a, b); }

inline Tensor index_select(const Tensor& t, int64_t dim, const Tensor& index) {
  return call("aten::index_select", "", t, dim, index);
}

inline Tensor mul(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }

inline Tensor silu(const Tensor& x) { return call("aten::silu", "", x); }

inline Tensor silu_backward(const Tensor& grad, const Tensor& x) { return call("aten::silu_backward", "", grad, x); }

// `approximate` is "none" or "tanh". PyTorch 2.13 leaks the few bytes of that string in every such call.
inline Tensor gelu(const Tensor& x, const std::string& approximate) { return call("aten::gelu", "", x, approximate); }

inline Tensor gelu_backward(const Tensor& grad, const Tensor& x, const std::string& approximate) {
  return call("aten::gelu_backward", "", grad, x, approximate);
}

// This function calls PyTorch directly: the dispatcher takes 2 µs more.
// A dense tensor without values, in the shape and on the device of t.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  AtenTensorHandle made = nullptr;
  const auto sizes = t.sizes();
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t d = t.dim() - 2; d >= 0; --d) strides[d] = strides[d + 1] * sizes[d + 1];
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      t.dim(), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device, t.get_device_index(), &made));
  return Tensor(made);
}

// t itself if it is contiguous. The test costs nothing; the operator call would.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor dense_copy(const Tensor& t, ScalarType dtype) {
  Tensor copy = torch::stable::new_empty(t, t.sizes(), dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// A copy in host memory. For a tensor on a GPU this waits for it.
inline Tensor on_cpu(const Tensor& t) {
  if (t.is_cpu()) return dense(t);
  Tensor copy = torch::stable::new_empty(t, t.sizes(), std::nullopt, std::nullopt,
                                         torch::stable::Device(torch::headeronly::DeviceType::CPU));
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace s2ft::aten
