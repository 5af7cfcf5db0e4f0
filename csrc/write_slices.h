// The body of write_slices_, shared by all devices: base + delta into units of any number of weights, in one pass.
//
// A Device has a constructor that takes a tensor on it, and write(slices, count).
#pragma once

#include <optional>
#include <vector>

#include "core/units.h"
#include "move.h"

namespace s2ft {

inline void check_slice(const Tensor& weight, const Tensor& base, const Tensor& delta, const Tensor& first,
                        int64_t dim) {
  const char* op = "write_slices_";
  require(weight.dim() == 2 && (dim == 0 || dim == 1), op, "weight must be a matrix and dim 0 or 1, got shape ",
          shape_of(weight), " and dim ", dim);
  check_weight(weight, dim, op);
  check_same_device(weight, first, op, "weight");
  require(base.scalar_type() == weight.scalar_type(), op, "base must have weight's dtype ",
          torch::headeronly::toString(weight.scalar_type()), ", got ", torch::headeronly::toString(base.scalar_type()));
  check_units(delta, weight, dim, op, "delta");
  check_units(base, weight, dim, op, "base");
  require(base.size(dim) == delta.size(dim), op, "base must have delta's shape ", shape_of(delta), ", got ",
          shape_of(base));
}

template <class Device>
void write_slices(std::vector<Tensor> weight, std::vector<Tensor> base, std::vector<Tensor> delta,
                  std::vector<std::optional<Tensor>> index, std::vector<int64_t> start, std::vector<int64_t> dim) {
  const char* op = "write_slices_";
  const size_t count = weight.size();
  require(base.size() == count && delta.size() == count && index.size() == count && start.size() == count &&
              dim.size() == count,
          op, "all lists must have the same number of entries");
  std::vector<Slice> slices;
  for (size_t j = 0; j < count; ++j) {
    check_slice(weight[j], base[j], delta[j], weight[0], dim[j]);
    base[j] = aten::dense(base[j]);
    delta[j] = aten::dense(delta[j]);
    const int64_t length = delta[j].size(dim[j]), limit = weight[j].size(dim[j]);
    Units units{
        nullptr,    start[j], limit, delta[j].size(0), delta[j].size(1), weight[j].stride(0), weight[j].stride(1),
        dim[j] == 0};
    if (index[j]) {
      check_index_tensor(*index[j], length, weight[j], op, "index");
      index[j] = aten::dense(*index[j]);
      units.index = index[j]->const_data_ptr<int64_t>();
      if (index[j]->is_cpu()) check_index_range(units.index, length, limit, op, "index");
    } else {
      require(start[j] >= 0 && length <= limit && start[j] <= limit - length, op, "slice ", start[j], ":",
              start[j] + length, " outside 0..", limit);
    }
    if (units.total() == 0) continue;
    slices.push_back({units, dtype_of(weight[j], op, "weight"), dtype_of(delta[j], op, "delta"),
                      weight[j].mutable_data_ptr(), base[j].const_data_ptr(), delta[j].const_data_ptr()});
  }
  if (!slices.empty()) Device(weight[0]).write(slices.data(), static_cast<int64_t>(slices.size()));
}

}  // namespace s2ft
