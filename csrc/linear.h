// The body of sliced_linear, indexed_linear and their input gradients, shared by all devices. grouped_linear.h uses it
// too.
//
// To the caller the ops are functions. Inside, base + delta is written into the weight's own memory for the time of one
// matrix product, and the base is then copied back, bit for bit. A forward is therefore one dense product, only the
// slice is copied, and nothing is cached that could become stale.
//
// A Device has a constructor that takes a tensor on it, and these members:
//   write(units, data): dense = base, weight = base + delta
//   sum(units, data): dense = base + delta
//   restore(units, data): weight = dense
//   begin(), end(): called under the lock, before and after everything that one op does to a weight
#pragma once

#include <mutex>
#include <utility>

#include "aten.h"
#include "checks.h"
#include "core/units.h"
#include "weight_lock.h"
#include "writable.h"

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

// A weight is a matrix, or several matrices [matrices, O, I].
inline void set_strides(Units* units, const Tensor& weight) {
  const bool several = weight.dim() == 3;
  units->outer_stride = weight.stride(several);
  units->inner_stride = weight.stride(several + 1);
  units->matrix_stride = several ? weight.stride(0) : 0;
}

// The units of `weight` that a delta changes. The caller sets start or index.
inline Units units_of(const Tensor& weight, const Tensor& delta, int64_t dim) {
  Units units{};
  const bool several = weight.dim() == 3;
  units.rows = dim == 0;
  units.per_matrix = several ? weight.size(1 + dim) : 0;
  units.limit = several ? weight.size(0) * units.per_matrix : weight.size(dim);
  units.outer = delta.size(0);
  units.inner = delta.size(1);
  set_strides(&units, weight);
  return units;
}

inline Units slice_units(const LinearArgs& a, int64_t start) {
  const int64_t length = a.delta.size(a.dim), size = a.weight.size(a.dim);
  require(start >= 0 && length <= size && start <= size - length, a.op, "slice ", start, ":", start + length,
          " outside weight.shape[", a.dim, "]=", size);
  Units units = units_of(a.weight, a.delta, a.dim);
  units.start = start;
  return units;
}

// Makes `*index` dense. The result points into it, so it must outlive the result.
inline Units index_units(const LinearArgs& a, Tensor* index) {
  check_index_tensor(*index, a.delta.size(a.dim), a.weight, a.op, "index");
  *index = aten::dense(*index);
  Units units = units_of(a.weight, a.delta, a.dim);
  units.index = index->const_data_ptr<int64_t>();
  if (index->is_cpu()) check_index_range(units.index, index->size(0), units.limit, a.op, "index");
  return units;
}

// A weight with delta added to its units, in `dtype`. The destructor gives the weight its old bits back.
template <class Device>
class EffectiveWeight {
 public:
  EffectiveWeight(const LinearArgs& a, const Units& units, ScalarType dtype)
      : device_(a.weight), units_(units), delta_(aten::dense(a.delta)), tensor_(a.weight) {
    dense_ = aten::empty_like(a.delta, a.weight.scalar_type());
    data_.weight_type = dtype_of(a.weight, a.op, "weight");
    data_.delta_type = dtype_of(a.delta, a.op, "delta");
    data_.delta = delta_.const_data_ptr();
    data_.dense = dense_.mutable_data_ptr();
    if (dtype == a.weight.scalar_type() && !may_overlap(a.weight))
      write_in_place(a.weight, a.op);
    else
      write_copy(a.weight, dtype);
  }

  EffectiveWeight(const EffectiveWeight&) = delete;
  EffectiveWeight& operator=(const EffectiveWeight&) = delete;

  ~EffectiveWeight() {
    try {
      restore();
    } catch (...) {  // the product has failed before, and its error is the one to report
    }
  }

  const Tensor& tensor() const { return tensor_; }

  // The normal exit, where a failure can still be reported.
  void restore() {
    if (!in_place_) return;
    in_place_ = false;
    const std::unique_lock<WeightLock> release = std::move(lock_);
    device_.restore(units_, data_);
    device_.end();
  }

 private:
  void write_in_place(const Tensor& weight, const char* op) {
    require_writable(weight, op);
    tensor_ = aten::detach(weight);
    lock_ = std::unique_lock<WeightLock>(weight_lock());
    data_.weight = weight.mutable_data_ptr();
    device_.begin();
    device_.write(units_, data_);
    in_place_ = true;
  }

  void write_copy(const Tensor& weight, ScalarType dtype) {
    read_base(weight, dtype);
    // base + delta has the weight's dtype here, because a copy too rounds to the weight's dtype first.
    const Tensor effective = aten::in_dtype(dense_, dtype);
    UnitsData target{};
    target.weight_type = dtype_of(tensor_, "effective weight", "dtype");
    target.weight = tensor_.mutable_data_ptr();
    target.dense = effective.mutable_data_ptr();
    Units units = units_;
    set_strides(&units, tensor_);
    device_.restore(units, target);
  }

  // Under the lock, because another thread may have base + delta in this weight.
  void read_base(const Tensor& weight, ScalarType dtype) {
    const std::lock_guard<WeightLock> lock(weight_lock());
    data_.weight = const_cast<void*>(weight.const_data_ptr());  // sum() does not write to it
    device_.begin();
    device_.sum(units_, data_);
    tensor_ = aten::dense_copy(weight, dtype);
    device_.end();
  }

  Device device_;
  Units units_;
  UnitsData data_{};
  Tensor delta_, dense_, tensor_;
  std::unique_lock<WeightLock> lock_;
  bool in_place_ = false;
};

// x and grad are made contiguous before the product. For a view with gaps PyTorch computes a batched product, and
// copies a frozen weight once for every row of the batch.
template <class Device>
Tensor multiply(const LinearArgs& a, const Units& units, const Tensor& x, const std::optional<Tensor>& bias) {
  std::optional<Tensor> cast_bias;
  if (bias) cast_bias = aten::in_dtype(*bias, x.scalar_type());
  EffectiveWeight<Device> effective(a, units, x.scalar_type());
  Tensor y = aten::linear(aten::dense(x), effective.tensor(), cast_bias);
  effective.restore();
  // Unless x is a matrix, linear() may return a view of its product. A model may change the output in place (OLMo's
  // clip_qkv), and autograd refuses that for a view that an op of ours returns.
  return x.dim() == 2 ? y : aten::not_a_view(y);
}

template <class Device>
Tensor multiply_grad(const LinearArgs& a, const Units& units, const Tensor& grad) {
  EffectiveWeight<Device> effective(a, units, grad.scalar_type());
  Tensor grad_x = aten::matmul(aten::dense(grad), effective.tensor());
  effective.restore();
  return grad_x;
}

// Only the backward uses the last argument of the two forwards.
template <class Device>
Tensor sliced_linear(const Tensor& x, const Tensor& weight, const Tensor& delta, int64_t start, int64_t dim,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>&) {
  const LinearArgs a{"sliced_linear", weight, delta, dim};
  check_linear(a, x, "x", weight.dim() == 2 ? weight.size(1) : -1);
  check_bias(a, bias);
  return multiply<Device>(a, slice_units(a, start), x, bias);
}

template <class Device>
Tensor sliced_linear_grad_x(const Tensor& grad, const Tensor& weight, const Tensor& delta, int64_t start, int64_t dim) {
  const LinearArgs a{"sliced_linear_grad_x", weight, delta, dim};
  check_linear(a, grad, "grad", weight.dim() == 2 ? weight.size(0) : -1);
  return multiply_grad<Device>(a, slice_units(a, start), grad);
}

template <class Device>
Tensor indexed_linear(const Tensor& x, const Tensor& weight, const Tensor& delta, const Tensor& index, int64_t dim,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>&) {
  const LinearArgs a{"indexed_linear", weight, delta, dim};
  check_linear(a, x, "x", weight.dim() == 2 ? weight.size(1) : -1);
  check_bias(a, bias);
  Tensor dense_index = index;
  const Units units = index_units(a, &dense_index);
  return multiply<Device>(a, units, x, bias);
}

template <class Device>
Tensor indexed_linear_grad_x(const Tensor& grad, const Tensor& weight, const Tensor& delta, const Tensor& index,
                             int64_t dim) {
  const LinearArgs a{"indexed_linear_grad_x", weight, delta, dim};
  check_linear(a, grad, "grad", weight.dim() == 2 ? weight.size(0) : -1);
  Tensor dense_index = index;
  const Units units = index_units(a, &dense_index);
  return multiply_grad<Device>(a, units, grad);
}

}  // namespace s2ft
