// The body of permute_, shared by all devices. A Device has a constructor that takes a tensor on it, and
// permute(Along, order, element size, weight tensor).
#pragma once

#include "move.h"

namespace s2ft {

template <class Device>
void permute(Tensor weight, const Tensor& order, int64_t dim) {
  const char* op = "permute_";
  check_weight(weight, dim, op);
  check_index_tensor(order, weight.size(dim), weight, op, "order");
  const int64_t size = movable_size(weight, op);
  const Tensor dense_order = aten::dense(order);
  // An order with one entry per unit, all in range and none twice, is a permutation.
  if (weight.is_cpu()) check_distinct(dense_order, weight.size(dim), op, "order");
  if (weight.numel() == 0) return;
  Device(weight).permute(along(weight, dim), dense_order.const_data_ptr<int64_t>(), size, weight);
}

}  // namespace s2ft
