// The body of act_mul and act_mul_backward, shared by all devices. A Device has computes(Activation, DType), which must
// be true for relu, and act_mul and act_mul_backward(Activation, ActMulData) for the cases it computes.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "aten.h"
#include "checks.h"
#include "core/activation.h"

namespace s2ft {

// Reads a string argument and frees it. If the argument were declared as std::string, the stable ABI's header would
// convert it and leak one string per call (PyTorch 2.10 to 2.13).
inline std::string take_string(StringHandle handle) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

inline Activation activation_of(const std::string& name, const char* op) {
#define S2FT_FIND(id, Act) \
  if (name == #id) return Activation::id;
  S2FT_ACTIVATIONS(S2FT_FIND)
#undef S2FT_FIND
#define S2FT_NAME(id, Act) ", " #id
  const std::string names = std::string(S2FT_ACTIVATIONS(S2FT_NAME)).substr(2);
#undef S2FT_NAME
  require(false, op, "activation must be one of ", names, ", got '", name, "'");
  return Activation{};
}

inline void check_like_gate(const Tensor& other, const Tensor& gate, const char* op, const char* name) {
  require(other.scalar_type() == gate.scalar_type(), op, name, " must have gate's dtype, ",
          torch::headeronly::toString(gate.scalar_type()), ", got ", torch::headeronly::toString(other.scalar_type()));
  bool same = other.dim() == gate.dim();
  for (int64_t d = 0; same && d < gate.dim(); ++d) same = other.size(d) == gate.size(d);
  require(same, op, name, " must have gate's shape ", shape_of(gate), ", got ", shape_of(other));
  const bool together = other.is_cpu() == gate.is_cpu() && other.get_device_index() == gate.get_device_index();
  require(together, op, name, " must be on gate's device");
}

// silu and gelu by PyTorch's operators, for the types that a device does not compute itself.
inline Tensor activate(Activation act, const Tensor& gate) {
  if (act == Activation::silu) return aten::silu(gate);
  return aten::gelu(gate, act == Activation::gelu_tanh ? "tanh" : "none");
}

inline Tensor activate_backward(Activation act, const Tensor& grad, const Tensor& gate) {
  if (act == Activation::silu) return aten::silu_backward(grad, gate);
  return aten::gelu_backward(grad, gate, act == Activation::gelu_tanh ? "tanh" : "none");
}

// Whether a tensor is a matrix whose rows are dense. Gaps between them do not matter.
inline bool has_dense_rows(const Tensor& t) { return t.dim() == 2 && t.stride(1) == 1; }

// Sets gate and up in the data, as they are if their rows are dense. Returns them, or dense copies.
inline std::pair<Tensor, Tensor> set_inputs(ActMulData& data, const Tensor& gate, const Tensor& up) {
  const bool in_rows = has_dense_rows(gate) && has_dense_rows(up);
  const Tensor g = in_rows ? gate : aten::dense(gate), u = in_rows ? up : aten::dense(up);
  data.size = g.numel();
  const bool one_row = g.is_contiguous() && u.is_contiguous();
  data.columns = one_row ? data.size : g.size(1);
  data.gate_row = one_row ? data.size : g.stride(0);
  data.up_row = one_row ? data.size : u.stride(0);
  data.gate = g.const_data_ptr();
  data.up = u.const_data_ptr();
  return {g, u};
}

template <class Device>
Tensor act_mul(const Tensor& gate, const Tensor& up, StringHandle activation) {
  const char* op = "act_mul";
  const Activation act = activation_of(take_string(activation), op);
  ActMulData data{};
  data.dtype = dtype_of(gate, op, "gate");
  check_like_gate(up, gate, op, "up");
  if (!Device::computes(act, data.dtype)) return aten::dense(aten::mul(activate(act, gate), up));
  const auto [g, u] = set_inputs(data, gate, up);
  Tensor out = torch::stable::new_empty(g, g.sizes());
  data.out = out.mutable_data_ptr();
  Device(g).act_mul(act, data);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> act_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                            StringHandle activation) {
  const char* op = "act_mul_backward";
  const Activation act = activation_of(take_string(activation), op);
  ActMulData data{};
  data.dtype = dtype_of(gate, op, "gate");
  check_like_gate(up, gate, op, "up");
  check_like_gate(grad, gate, op, "grad");
  if (!Device::computes(act, data.dtype))
    return {aten::dense(activate_backward(act, aten::mul(grad, up), gate)),
            aten::dense(aten::mul(grad, activate(act, gate)))};
  const Tensor d = aten::dense(grad);
  const auto [g, u] = set_inputs(data, gate, up);
  Tensor grad_gate = torch::stable::new_empty(g, g.sizes()), grad_up = torch::stable::new_empty(g, g.sizes());
  data.grad = d.const_data_ptr();
  data.grad_gate = grad_gate.mutable_data_ptr();
  data.grad_up = grad_up.mutable_data_ptr();
  Device(g).act_mul_backward(act, data);
  return {grad_gate, grad_up};
}

}  // namespace s2ft
