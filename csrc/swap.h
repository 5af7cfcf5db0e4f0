// The body of swap_, shared by all devices. A Device has a constructor that takes a tensor on it, and
// exchange(Exchange, element size, weight, values).
#pragma once

#include "core/exchange.h"
#include "move.h"

namespace s2ft {

inline void check_swap(const Tensor& weight, const Tensor& index, const Tensor& values, int64_t dim) {
  const char* op = "swap_";
  check_weight(weight, dim, op);
  require(values.scalar_type() == weight.scalar_type(), op, "values must have weight's dtype ",
          torch::headeronly::toString(weight.scalar_type()), ", got ",
          torch::headeronly::toString(values.scalar_type()));
  check_units(values, weight, dim, op, "values");
  check_index_tensor(index, values.size(dim), weight, op, "index");
  require(!may_overlap(values), op, "values has elements that share memory");
  require_writable(values, op, "values");
}

template <class Device>
void swap(Tensor weight, const Tensor& index, Tensor values, int64_t dim) {
  check_swap(weight, index, values, dim);
  const int64_t size = movable_size(weight, "swap_");
  const Tensor dense_index = aten::dense(index);
  if (weight.is_cpu()) check_distinct(dense_index, weight.size(dim), "swap_", "index");
  if (values.numel() == 0) return;
  const Exchange exchange{along(weight, dim), along(values, dim), dense_index.const_data_ptr<int64_t>()};
  Device(weight).exchange(exchange, size, weight.mutable_data_ptr(), values.mutable_data_ptr());
}

}  // namespace s2ft
