// The body of scatter_add_, once for every device. A Device has a constructor from a tensor on it,
// begin() and end() (see linear.h), and scatter_add(Scatter, weight tensor).
#pragma once

#include <vector>

#include "core/scatter.h"
#include "effective_lock.h"
#include "move.h"

namespace s2ft {

inline void check_part(const Tensor& weight, const Tensor& index, const Tensor& delta, const Tensor& first,
                       int64_t dim) {
  const char* op = "scatter_add_";
  dtype_of(delta, op, "delta");
  require(delta.scalar_type() == first.scalar_type(), op, "deltas must have one dtype, got ",
          torch::headeronly::toString(first.scalar_type()), " and ", torch::headeronly::toString(delta.scalar_type()));
  check_units(delta, weight, dim, op, "delta");
  check_index_tensor(index, delta.size(dim), weight, op, "index");
}

template <class Device>
void scatter_add(Tensor weight, std::vector<Tensor> index, std::vector<Tensor> delta, int64_t dim,
                 std::vector<double> alpha) {
  const char* op = "scatter_add_";
  check_weight(weight, dim, op);
  const DType weight_type = dtype_of(weight, op, "weight");
  require(index.size() == delta.size() && alpha.size() == delta.size(), op, "index, delta and alpha must be as many, got ",
          index.size(), ", ", delta.size(), " and ", alpha.size());
  if (delta.empty()) return;
  std::vector<Part> parts;
  for (size_t j = 0; j < delta.size(); ++j) {
    check_part(weight, index[j], delta[j], delta[0], dim);
    index[j] = aten::dense(index[j]);
    if (weight.is_cpu()) check_distinct(index[j], weight.size(dim), op, "index");
    parts.push_back({along(delta[j], dim), delta[j].const_data_ptr(), index[j].const_data_ptr<int64_t>(), alpha[j]});
  }
  if (weight.numel() == 0) return;
  const Scatter scatter{along(weight, dim), weight.mutable_data_ptr(), weight_type, dtype_of(delta[0], op, "delta"),
                        parts.data(), static_cast<int64_t>(parts.size())};
  const Device device(weight);
  in_turn(device, [&] { device.scatter_add(scatter, weight); });
}

}  // namespace s2ft
