// The body of grouped_linear and the gradient of its x, shared by all devices: a linear layer for each group of tokens,
// with the weights of all groups in one tensor [groups, O, I]. The units of all groups are written and restored
// together, as linear.h does it for one matrix.
#pragma once

#include "linear.h"

namespace s2ft {

inline void check_grouped(const LinearArgs& a, const Tensor& index, const Tensor& offsets, const Tensor& x,
                          const char* x_name, int64_t side) {
  require(a.dim == 0 || a.dim == 1, a.op, "dim must be 0 (outputs) or 1 (inputs), got ", a.dim);
  require(a.weight.dim() == 3, a.op, "weight must be [groups, outputs, inputs], got shape ", shape_of(a.weight));
  require(a.delta.dim() == 2, a.op, "delta must be a matrix, got shape ", shape_of(a.delta));
  dtype_of(a.weight, a.op, "weight");
  dtype_of(a.delta, a.op, "delta");
  dtype_of(x, a.op, x_name);
  require(a.delta.size(1 - a.dim) == a.weight.size(2 - a.dim), a.op, "delta of shape ", shape_of(a.delta),
          " does not fit dim ", a.dim, " of weight of shape ", shape_of(a.weight));
  require(x.dim() == 2 && x.size(1) == a.weight.size(side), a.op, x_name, " of shape ", shape_of(x),
          " does not fit weight of shape ", shape_of(a.weight));
  require(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) == a.weight.size(0), a.op,
          "offsets must be int32 of shape (", a.weight.size(0), ",), got ",
          torch::headeronly::toString(offsets.scalar_type()), " of shape ", shape_of(offsets));
  check_index_tensor(index, a.delta.size(a.dim), a.weight, a.op, "index");
  check_same_device(x, a.weight, a.op, x_name);
  check_same_device(a.delta, a.weight, a.op, "delta");
  check_same_device(offsets, a.weight, a.op, "offsets");
}

// What PyTorch's grouped product takes: no float64, rows and matrices that start at multiples of 16 bytes.
inline bool takes(const Tensor& t) {
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  if (t.scalar_type() == ScalarType::Double || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
  bool has_unit = false;
  for (int64_t d = t.dim() - 2; d < t.dim(); ++d) {
    if (t.stride(d) == 1)
      has_unit = true;
    else if (t.stride(d) * size % 16)
      return false;
  }
  return has_unit && t.size(-1) > 0 && t.size(-2) > 0;
}

// x [tokens, A] times the matrix of each token's group: weights [groups, A, B] → [tokens, B]. Rows of tokens after the
// last group are undefined.
inline Tensor product_by_groups(const Tensor& x, const Tensor& weights, const Tensor& offsets) {
  if (takes(x) && takes(weights)) return aten::grouped_mm(x, weights, offsets);
  const Tensor ends = aten::on_cpu(offsets);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  Tensor rows = x, y = torch::stable::new_zeros(x, {x.size(0), weights.size(2)});
  for (int64_t g = 0, begin = 0; g < weights.size(0); begin = end[g++]) {
    if (end[g] <= begin) continue;
    Tensor target = torch::stable::narrow(y, 0, begin, end[g] - begin);
    const Tensor part = torch::stable::narrow(rows, 0, begin, end[g] - begin);
    torch::stable::copy_(target, aten::matmul(part, torch::stable::select(weights, 0, g)));
  }
  return y;
}

// `most` is for the gradients only, and so is the last argument.
template <class Device>
Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& delta, const Tensor& index, int64_t,
                      const Tensor& offsets, int64_t dim, const std::optional<Tensor>&) {
  const LinearArgs a{"grouped_linear", weight, delta, dim};
  check_grouped(a, index, offsets, x, "x", 2);
  Tensor dense_index = index;
  const Units units = index_units(a, &dense_index);
  EffectiveWeight<Device> effective(a, units, x.scalar_type());
  Tensor y = product_by_groups(aten::dense(x), torch::stable::transpose(effective.tensor(), 1, 2), offsets);
  effective.restore();
  return y;
}

template <class Device>
Tensor grouped_linear_grad_x(const Tensor& grad, const Tensor& weight, const Tensor& delta, const Tensor& index,
                             int64_t, const Tensor& offsets, int64_t dim) {
  const LinearArgs a{"grouped_linear_grad_x", weight, delta, dim};
  check_grouped(a, index, offsets, grad, "grad", 1);
  Tensor dense_index = index;
  const Units units = index_units(a, &dense_index);
  EffectiveWeight<Device> effective(a, units, grad.scalar_type());
  Tensor grad_x = product_by_groups(aten::dense(grad), effective.tensor(), offsets);
  effective.restore();
  return grad_x;
}

}  // namespace s2ft
