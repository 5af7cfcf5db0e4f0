// The body of write_slices_, shared by all devices: base + delta into units of any number of weights, in one pass.
//
// A Device has a constructor that takes a tensor on it, and write(slices, count).
#pragma once

#include <optional>
#include <vector>

#include "core/units.h"
#include "move.h"

namespace s2ft {

// The units of a matrix that a delta changes. The caller sets start or index.
inline Units units_of(const Tensor& weight, const Tensor& delta, int64_t dim) {
  Units units{};
  units.rows = dim == 0;
  units.limit = weight.size(dim);
  units.outer = delta.size(0);
  units.inner = delta.size(1);
  units.outer_stride = weight.stride(0);
  units.inner_stride = weight.stride(1);
  return units;
}

inline void set_start(Units* units, int64_t start, int64_t length, const char* op) {
  require(start >= 0 && length <= units->limit && start <= units->limit - length, op, "slice ", start, ":",
          start + length, " outside 0..", units->limit);
  units->start = start;
}

// Makes `*index` dense. The units point into it.
inline void set_index(Units* units, Tensor* index, int64_t length, const Tensor& weight, const char* op) {
  check_index_tensor(*index, length, weight, op, "index");
  *index = aten::dense(*index);
  units->index = index->const_data_ptr<int64_t>();
  if (index->is_cpu()) check_index_range(units->index, length, units->limit, op, "index");
}

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
    Units units = units_of(weight[j], delta[j], dim[j]);
    if (index[j])
      set_index(&units, &*index[j], delta[j].size(dim[j]), weight[j], op);
    else
      set_start(&units, start[j], delta[j].size(dim[j]), op);
    if (units.total() == 0) continue;
    slices.push_back({units, dtype_of(weight[j], op, "weight"), dtype_of(delta[j], op, "delta"),
                      weight[j].mutable_data_ptr(), base[j].const_data_ptr(), delta[j].const_data_ptr()});
  }
  if (!slices.empty()) Device(weight[0]).write(slices.data(), static_cast<int64_t>(slices.size()));
}

}  // namespace s2ft
