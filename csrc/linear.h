// The body of sliced_linear, indexed_linear and their input gradients, shared by all devices.
//
// The product is one dense product with a copy of the weight, in which the units hold base + delta. write_slices.h says
// what a Device has.
#pragma once

#include "aten.h"
#include "checks.h"
#include "write_slices.h"

namespace s2ft {

struct LinearArgs {
  const char* op;
  const Tensor& weight;
  const Tensor& delta;
  int64_t dim;
};

inline void check_linear(const LinearArgs& a, const Tensor& x, const char* x_name, int64_t x_size) {
  require(a.dim == 0 || a.dim == 1, a.op, "dim must be 0 (outputs) or 1 (inputs), got ", a.dim);
  require(a.weight.dim() == 2, a.op, "weight must be a matrix, got shape ", shape_of(a.weight));
  require(a.delta.dim() == 2, a.op, "delta must be a matrix, got shape ", shape_of(a.delta));
  dtype_of(a.weight, a.op, "weight");
  dtype_of(a.delta, a.op, "delta");
  dtype_of(x, a.op, x_name);
  require(a.delta.size(1 - a.dim) == a.weight.size(1 - a.dim), a.op, "delta of shape ", shape_of(a.delta),
          " does not fit dim ", a.dim, " of weight of shape ", shape_of(a.weight));
  require(x.dim() > 0 && x.size(-1) == x_size, a.op, x_name, " of shape ", shape_of(x),
          " does not fit weight of shape ", shape_of(a.weight));
  check_same_device(x, a.weight, a.op, x_name);
  check_same_device(a.delta, a.weight, a.op, "delta");
}

inline void check_bias(const LinearArgs& a, const std::optional<Tensor>& bias) {
  if (!bias) return;
  require(bias->dim() == 1 && bias->size(0) == a.weight.size(0), a.op, "bias must have shape (", a.weight.size(0),
          ",), got ", shape_of(*bias));
  check_same_device(*bias, a.weight, a.op, "bias");
}

inline Units slice_units(const LinearArgs& a, int64_t start) {
  Units units = units_of(a.weight, a.delta, a.dim);
  set_start(&units, start, a.delta.size(a.dim), a.op);
  return units;
}

// Makes `*index` dense. The result points into it, so it must outlive the result.
inline Units index_units(const LinearArgs& a, Tensor* index) {
  Units units = units_of(a.weight, a.delta, a.dim);
  set_index(&units, index, a.delta.size(a.dim), a.weight, a.op);
  return units;
}

// A copy of the weight with delta added to its units, rounded to the weight's dtype, and then cast to `dtype`.
template <class Device>
Tensor effective_weight(const LinearArgs& a, Units units, const Tensor* index, ScalarType dtype) {
  const Tensor base = aten::dense(
      index ? aten::index_select(a.weight, a.dim, *index)
            : torch::stable::narrow(const_cast<Tensor&>(a.weight), a.dim, units.start, a.delta.size(a.dim)));
  const Tensor copy = aten::dense_copy(a.weight, a.weight.scalar_type()), delta = aten::dense(a.delta);
  units.outer_stride = copy.stride(0);
  units.inner_stride = copy.stride(1);
  const Slice slice{units,
                    dtype_of(copy, a.op, "weight"),
                    dtype_of(delta, a.op, "delta"),
                    copy.mutable_data_ptr(),
                    base.const_data_ptr(),
                    delta.const_data_ptr()};
  if (units.total()) Device(copy).write(&slice, 1);
  return aten::in_dtype(copy, dtype);
}

// x and grad are made contiguous before the product. For a view with gaps PyTorch computes a batched product, and
// copies a frozen weight once for every row of the batch.
template <class Device>
Tensor multiply(const LinearArgs& a, const Units& units, const Tensor* index, const Tensor& x,
                const std::optional<Tensor>& bias) {
  std::optional<Tensor> cast_bias;
  if (bias) cast_bias = aten::in_dtype(*bias, x.scalar_type());
  Tensor y = aten::linear(aten::dense(x), effective_weight<Device>(a, units, index, x.scalar_type()), cast_bias);
  // Unless x is a matrix, linear() may return a view of its product. A model may change the output in place (OLMo's
  // clip_qkv), and autograd refuses that for a view that an op of ours returns.
  return x.dim() == 2 ? y : aten::not_a_view(y);
}

template <class Device>
Tensor multiply_grad(const LinearArgs& a, const Units& units, const Tensor* index, const Tensor& grad) {
  return aten::matmul(aten::dense(grad), effective_weight<Device>(a, units, index, grad.scalar_type()));
}

// Only the backward uses the last argument of the two forwards.
template <class Device>
Tensor sliced_linear(const Tensor& x, const Tensor& weight, const Tensor& delta, int64_t start, int64_t dim,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>&) {
  const LinearArgs a{"sliced_linear", weight, delta, dim};
  check_linear(a, x, "x", weight.dim() == 2 ? weight.size(1) : -1);
  check_bias(a, bias);
  return multiply<Device>(a, slice_units(a, start), nullptr, x, bias);
}

template <class Device>
Tensor sliced_linear_grad_x(const Tensor& grad, const Tensor& weight, const Tensor& delta, int64_t start, int64_t dim) {
  const LinearArgs a{"sliced_linear_grad_x", weight, delta, dim};
  check_linear(a, grad, "grad", weight.dim() == 2 ? weight.size(0) : -1);
  return multiply_grad<Device>(a, slice_units(a, start), nullptr, grad);
}

template <class Device>
Tensor indexed_linear(const Tensor& x, const Tensor& weight, const Tensor& delta, const Tensor& index, int64_t dim,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>&) {
  const LinearArgs a{"indexed_linear", weight, delta, dim};
  check_linear(a, x, "x", weight.dim() == 2 ? weight.size(1) : -1);
  check_bias(a, bias);
  Tensor dense_index = index;
  const Units units = index_units(a, &dense_index);
  return multiply<Device>(a, units, &dense_index, x, bias);
}

template <class Device>
Tensor indexed_linear_grad_x(const Tensor& grad, const Tensor& weight, const Tensor& delta, const Tensor& index,
                             int64_t dim) {
  const LinearArgs a{"indexed_linear_grad_x", weight, delta, dim};
  check_linear(a, grad, "grad", weight.dim() == 2 ? weight.size(0) : -1);
  Tensor dense_index = index;
  const Units units = index_units(a, &dense_index);
  return multiply_grad<Device>(a, units, &dense_index, grad);
}

}  // namespace s2ft
