// permute_: weight := weight.index_select(dim, order), in place.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../core/cycles.h"
#include "../core/numeric.h"
#include "parallel.h"

namespace s2ft {
namespace {

// The weight as three dimensions, padded in front with size 1, and the one that is permuted.
struct Axis {
  int64_t size[3];
  int64_t stride[3];
  int dim;
};

Axis axis_of(const Tensor& weight, int64_t dim) {
  Axis axis{};
  const int64_t pad = 3 - weight.dim();
  axis.dim = static_cast<int>(dim + pad);
  for (int64_t d = 0; d < 3; ++d) {
    axis.size[d] = d < pad ? 1 : weight.size(d - pad);
    axis.stride[d] = d < pad ? 0 : weight.stride(d - pad);
  }
  return axis;
}

template <class T>
void copy_span(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1)
    std::copy(from, from + n, to);
  else
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

// Moves spans of `n` elements, `stride` apart, along the cycles; positions are `step` apart.
template <class T>
void rotate(const Cycles& cycles, T* base, int64_t step, int64_t stride, int64_t n, T* scratch) {
  int64_t begin = 0;
  for (int64_t end : cycles.ends) {
    const int64_t* p = cycles.positions.data();
    copy_span(base + p[begin] * step, stride, scratch, 1, n);
    for (int64_t j = begin; j + 1 < end; ++j)
      copy_span(base + p[j + 1] * step, stride, base + p[j] * step, stride, n);
    copy_span(scratch, 1, base + p[end - 1] * step, stride, n);
    begin = end;
  }
}

// Elements of a row moved at once: small enough for all threads to share a wide row.
constexpr int64_t kBlock = 512;

// dim 0 or 1 of three: whole spans of the last dimension move.
template <class T>
void permute_rows(const Axis& axis, const Cycles& cycles, T* weight) {
  const int other = 1 - axis.dim;
  const int64_t columns = axis.size[2], blocks = (columns + kBlock - 1) / kBlock;
  const int64_t moved = static_cast<int64_t>(cycles.positions.size());
  parallel_lines(axis.size[other] * blocks, moved * std::min(kBlock, columns), [&](int64_t begin, int64_t end) {
    T scratch[kBlock];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / blocks, first = t % blocks * kBlock;
      rotate(cycles, weight + row * axis.stride[other] + first * axis.stride[2], axis.stride[axis.dim],
             axis.stride[2], std::min(kBlock, columns - first), scratch);
    }
  });
}

// dim 2 of three: single elements move within each row.
template <class T>
void permute_columns(const Axis& axis, const Cycles& cycles, T* weight) {
  const int64_t moved = static_cast<int64_t>(cycles.positions.size());
  parallel_lines(axis.size[0] * axis.size[1], moved, [&](int64_t begin, int64_t end) {
    T scratch;
    for (int64_t row = begin; row < end; ++row)
      rotate(cycles, weight + row / axis.size[1] * axis.stride[0] + row % axis.size[1] * axis.stride[1],
             axis.stride[2], 1, 1, &scratch);
  });
}

void permute(Tensor weight, const Tensor& order, int64_t dim) {
  const char* op = "permute_";
  require(weight.dim() >= 1 && weight.dim() <= 3, op, "weight must have 1 to 3 dimensions, got shape ",
          shape_of(weight));
  require(dim >= 0 && dim < weight.dim(), op, "dim must be 0 to ", weight.dim() - 1, ", got ", dim);
  check_index_tensor(order, weight.size(dim), weight, op, "order");
  require(!may_overlap(weight), op, "weight has elements that share memory");
  const int64_t element_size = static_cast<int64_t>(weight.element_size());
  require(element_size == 1 || element_size == 2 || element_size == 4 || element_size == 8, op,
          "weight has elements of ", element_size, " bytes");
  const Tensor dense_order = torch::stable::contiguous(order);
  Cycles cycles;
  require(cycles_of(dense_order.const_data_ptr<int64_t>(), order.size(0), &cycles), op,
          "order is no permutation of 0..", order.size(0) - 1);
  if (cycles.empty() || weight.numel() == 0) return;
  const Axis axis = axis_of(weight, dim);
  void* data = weight.mutable_data_ptr();
  visit_bits(element_size, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (axis.dim == 2)
      permute_columns(axis, cycles, static_cast<T*>(data));
    else
      permute_rows(axis, cycles, static_cast<T*>(data));
  });
}

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) { m.impl("permute_", TORCH_BOX(&s2ft::permute)); }
