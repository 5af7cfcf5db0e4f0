// The body of swap_, once for every device. A Device has exchange(Exchange, element size, weight,
// values).
#pragma once

#include <vector>

#include "aten.h"
#include "checks.h"
#include "core/exchange.h"

namespace s2ft {

inline void check_swap(const Tensor& weight, const Tensor& index, const Tensor& values, int64_t dim) {
  const char* op = "swap_";
  require(weight.dim() >= 1 && weight.dim() <= 3, op, "weight must have 1 to 3 dimensions, got shape ",
          shape_of(weight));
  require(dim >= 0 && dim < weight.dim(), op, "dim must be 0 to ", weight.dim() - 1, ", got ", dim);
  require(values.scalar_type() == weight.scalar_type(), op, "values must have the dtype of weight, ",
          torch::headeronly::toString(weight.scalar_type()), ", got ",
          torch::headeronly::toString(values.scalar_type()));
  require(values.dim() == weight.dim(), op, "values of shape ", shape_of(values),
          " must have as many dimensions as weight of shape ", shape_of(weight));
  check_index_tensor(index, values.size(dim), weight, op, "index");
  for (int64_t d = 0; d < weight.dim(); ++d)
    require(d == dim || values.size(d) == weight.size(d), op, "values of shape ", shape_of(values),
            " do not fit weight of shape ", shape_of(weight), " along dim ", d);
  check_same_device(values, weight, op, "values");
  require(!may_overlap(weight), op, "weight has elements that share memory");
  require(!may_overlap(values), op, "values has elements that share memory");
}

inline void check_no_repeats(const int64_t* index, int64_t length, int64_t limit) {
  std::vector<bool> seen(static_cast<size_t>(limit));
  for (int64_t k = 0; k < length; ++k) {
    require(!seen[index[k]], "swap_", "index names unit ", index[k], " twice");
    seen[index[k]] = true;
  }
}

inline Exchange exchange_of(const Tensor& weight, const int64_t* index, const Tensor& values, int64_t dim) {
  Exchange e{};
  e.index = index;
  e.limit = weight.size(dim);
  const int64_t pad = 3 - weight.dim();
  e.dim = static_cast<int>(dim + pad);
  for (int64_t d = 0; d < 3; ++d) {
    e.size[d] = d < pad ? 1 : values.size(d - pad);
    e.weight_stride[d] = d < pad ? 0 : weight.stride(d - pad);
    e.values_stride[d] = d < pad ? 0 : values.stride(d - pad);
  }
  return e;
}

template <class Device>
void swap(Tensor weight, const Tensor& index, Tensor values, int64_t dim) {
  check_swap(weight, index, values, dim);
  const Tensor dense_index = torch::stable::contiguous(index);
  const int64_t* units = dense_index.const_data_ptr<int64_t>();
  if (weight.is_cpu()) {
    check_index_range(units, index.size(0), weight.size(dim), "swap_", "index");
    check_no_repeats(units, index.size(0), weight.size(dim));
  }
  const int64_t size = static_cast<int64_t>(weight.element_size());
  require(size == 1 || size == 2 || size == 4 || size == 8, "swap_", "weight has elements of ", size, " bytes");
  Device(weight).exchange(exchange_of(weight, units, values, dim), size, weight.mutable_data_ptr(),
                          values.mutable_data_ptr());
}

}  // namespace s2ft
