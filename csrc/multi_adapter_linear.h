// The body of multi_adapter_linear, shared by all devices. A Device has a constructor that takes a tensor on it, and
// add(Bank, Batch, DType, x, values): out = y + the deltas' products.
#pragma once

#include "aten.h"
#include "checks.h"
#include "core/bank.h"

namespace s2ft {

inline void check_bank(const Tensor& x, const Tensor& y, const Tensor& values, const Tensor& index,
                       const Tensor& offsets, int64_t dim) {
  const char* op = "multi_adapter_linear";
  require(dim == 0 || dim == 1, op, "dim must be 0 (outputs) or 1 (inputs), got ", dim);
  require(values.dim() == 2, op, "values must be a matrix, got shape ", shape_of(values));
  require(x.scalar_type() == values.scalar_type() && y.scalar_type() == values.scalar_type(), op,
          "x, y and values must have one dtype");
  require(x.dim() >= 2 && x.dim() == y.dim(), op,
          "x and y must have the same number of dimensions, at least two, got shapes ", shape_of(x), " and ",
          shape_of(y));
  for (int64_t d = 0; d + 1 < x.dim(); ++d)
    require(x.size(d) == y.size(d), op, "y of shape ", shape_of(y), " does not fit x of shape ", shape_of(x));
  const Tensor& across = dim == 0 ? x : y;
  require(values.size(1) == across.size(-1), op, "values of shape ", shape_of(values), " do not fit ",
          dim == 0 ? "x" : "y", " of shape ", shape_of(across));
  check_index_tensor(index, values.size(0), x, op, "index");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, op,
          "offsets must have one dimension and at least one entry, got shape ", shape_of(offsets));
  check_index_tensor(offsets, offsets.size(0), x, op, "offsets");
  check_same_device(y, x, op, "y");
  check_same_device(values, x, op, "values");
}

// Checks that all adapters of the batch exist and that their units are in range. All must be in host memory.
inline void check_entries(const Bank& bank, const Batch& batch) {
  const char* op = "multi_adapter_linear";
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t a = batch.adapter[b];
    require(a == -1 || bank.has(a), op, "adapter has ", a, ", outside -1..", bank.adapters - 1);
    if (a < 0) continue;
    const int64_t begin = bank.offsets[a], end = bank.offsets[a + 1];
    require(0 <= begin && begin <= end && end <= bank.units, op, "offsets of adapter ", a, " are ", begin, " and ", end,
            ", outside 0..", bank.units);
    check_index_range(bank.index + begin, end - begin, batch.limit(bank), op, "index");
  }
}

template <class Device>
Tensor multi_adapter_linear(const Tensor& x, const Tensor& y, const Tensor& values, const Tensor& index,
                            const Tensor& offsets, const Tensor& adapter, int64_t dim) {
  const DType dtype = dtype_of(values, "multi_adapter_linear", "values");
  check_bank(x, y, values, index, offsets, dim);
  check_index_tensor(adapter, x.size(0), x, "multi_adapter_linear", "adapter");
  const Tensor in = aten::dense(x), base = aten::dense(y), rows = aten::dense(values), units = aten::dense(index),
               bounds = aten::dense(offsets), names = aten::dense(adapter);
  const Bank bank{rows.const_data_ptr(),
                  units.const_data_ptr<int64_t>(),
                  bounds.const_data_ptr<int64_t>(),
                  bounds.size(0) - 1,
                  rows.size(0),
                  rows.size(1),
                  dim == 0};
  Tensor out = torch::stable::new_empty(base, base.sizes());
  Batch batch{in.const_data_ptr(),
              base.const_data_ptr(),
              out.mutable_data_ptr(),
              names.const_data_ptr<int64_t>(),
              in.size(0),
              1,
              in.size(-1),
              y.size(-1)};
  for (int64_t d = 1; d + 1 < in.dim(); ++d) batch.tokens *= in.size(d);
  if (x.is_cpu()) check_entries(bank, batch);
  if (out.numel() > 0) Device(x).add(bank, batch, dtype, in, rows);
  return out;
}

}  // namespace s2ft
