// The body of scatter_add_, shared by all devices. A Device has a constructor that takes a tensor on it, and
// scatter_add(Scatter, weight tensor).
#pragma once

#include <vector>

#include "core/scatter.h"
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

inline void check_replaced(const Tensor& weight, const Tensor& delta, const Tensor& replaced, int64_t dim) {
  const char* op = "scatter_add_";
  require(replaced.scalar_type() == weight.scalar_type(), op, "replaced must have weight's dtype ",
          torch::headeronly::toString(weight.scalar_type()), ", got ",
          torch::headeronly::toString(replaced.scalar_type()));
  check_units(replaced, weight, dim, op, "replaced");
  require(replaced.size(dim) == delta.size(dim), op, "replaced must have delta's shape ", shape_of(delta), ", got ",
          shape_of(replaced));
  require(!may_overlap(replaced), op, "replaced has elements that share memory");
  require_writable(replaced, op, "replaced");
}

template <class Device>
void scatter_add(Tensor weight, std::vector<Tensor> index, std::vector<Tensor> delta, int64_t dim,
                 std::vector<double> alpha, std::vector<Tensor> replaced) {
  const char* op = "scatter_add_";
  check_weight(weight, dim, op);
  const DType weight_type = dtype_of(weight, op, "weight");
  const size_t count = delta.size();
  require(index.size() == count && alpha.size() == count && (replaced.empty() || replaced.size() == count), op,
          "index, delta, alpha and replaced must have the same number of entries, got ", index.size(), ", ", count,
          ", ", alpha.size(), " and ", replaced.size());
  if (delta.empty()) return;
  std::vector<Part> parts;
  for (size_t j = 0; j < count; ++j) {
    check_part(weight, index[j], delta[j], delta[0], dim);
    index[j] = aten::dense(index[j]);
    if (weight.is_cpu()) check_distinct(index[j], weight.size(dim), op, "index");
    Part part{
        along(delta[j], dim), {}, delta[j].const_data_ptr(), nullptr, index[j].const_data_ptr<int64_t>(), alpha[j]};
    if (!replaced.empty()) {
      check_replaced(weight, delta[j], replaced[j], dim);
      part.replaced = along(replaced[j], dim);
      part.old = replaced[j].mutable_data_ptr();
    }
    parts.push_back(part);
  }
  if (weight.numel() == 0) return;
  const Scatter scatter{
      along(weight, dim), weight.mutable_data_ptr(),   weight_type,      dtype_of(delta[0], op, "delta"),
      parts.data(),       static_cast<int64_t>(count), !replaced.empty()};
  Device(weight).scatter_add(scatter, weight);
}

}  // namespace s2ft
