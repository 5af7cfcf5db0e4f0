// The checks and preparations that permute_, swap_ and scatter_add_ share on all devices.
#pragma once

#include <vector>

#include "aten.h"
#include "checks.h"
#include "core/along.h"
#include "writable.h"

namespace s2ft {

inline void check_weight(const Tensor& weight, int64_t dim, const char* op) {
  require(weight.dim() >= 1 && weight.dim() <= 3, op, "weight must have 1 to 3 dimensions, got shape ",
          shape_of(weight));
  require(dim >= 0 && dim < weight.dim(), op, "dim must be 0 to ", weight.dim() - 1, ", got ", dim);
  require(!may_overlap(weight), op, "weight has elements that share memory");
  require_writable(weight, op);
}

inline int64_t movable_size(const Tensor& weight, const char* op) {
  const int64_t size = static_cast<int64_t>(weight.element_size());
  require(size == 1 || size == 2 || size == 4 || size == 8, op, "weight has elements of ", size, " bytes");
  return size;
}

// Checks that `values` has weight's shape, with any number of units along dim.
inline void check_units(const Tensor& values, const Tensor& weight, int64_t dim, const char* op, const char* name) {
  require(values.dim() == weight.dim(), op, name, " of shape ", shape_of(values),
          " must have as many dimensions as weight of shape ", shape_of(weight));
  for (int64_t d = 0; d < weight.dim(); ++d)
    require(d == dim || values.size(d) == weight.size(d), op, name, " must fit weight of shape ", shape_of(weight),
            " along dim ", d, ", got shape ", shape_of(values));
  check_same_device(values, weight, op, name);
}

// Checks that every entry is in range and none occurs twice. The index must be in host memory.
inline void check_distinct(const Tensor& dense_index, int64_t limit, const char* op, const char* name) {
  const int64_t* index = dense_index.const_data_ptr<int64_t>();
  const int64_t length = dense_index.size(0);
  check_index_range(index, length, limit, op, name);
  std::vector<bool> seen(static_cast<size_t>(limit));
  for (int64_t k = 0; k < length; ++k) {
    require(!seen[index[k]], op, name, " names unit ", index[k], " twice");
    seen[index[k]] = true;
  }
}

inline Along along(const Tensor& t, int64_t dim) {
  const auto size = [&](int64_t d) { return d < 0 ? int64_t{1} : t.size(d); };
  const auto stride = [&](int64_t d) { return d < 0 ? int64_t{0} : t.stride(d); };
  const int64_t last = t.dim() - 1;
  // The two other dimensions. If the tensor has fewer, their size is 1.
  const int64_t inner = dim == last ? last - 1 : last,
                outer = dim == last ? last - 2 : (dim == last - 1 ? last - 2 : last - 1);
  return Along{t.size(dim), size(outer), size(inner), t.stride(dim), stride(outer), stride(inner), dim == last};
}

}  // namespace s2ft
