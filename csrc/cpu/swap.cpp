#include "../swap.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "parallel.h"

namespace s2ft {
namespace {

template <class T>
void swap_spans(T* weight, int64_t weight_stride, T* values, int64_t values_stride, int64_t n) {
  if (weight_stride == 1 && values_stride == 1)
    for (int64_t i = 0; i < n; ++i) std::swap(weight[i], values[i]);
  else
    for (int64_t i = 0; i < n; ++i) std::swap(weight[i * weight_stride], values[i * values_stride]);
}

// Exchanges spans of neighbouring lines of one unit.
template <class T>
void swap_rows(const Exchange& e, T* weight, T* values) {
  const Along &w = e.weight, &v = e.values;
  parallel_spans(v.units * v.outer, v.inner, [&](int64_t item, int64_t first, int64_t n) {
    const int64_t k = item / v.outer, o = item % v.outer;
    swap_spans(weight + w.offset(o, first, e.index[k]), w.inner_stride, values + v.offset(o, first, k), v.inner_stride,
               n);
  });
}

template <class T>
void swap_columns(const Exchange& e, T* weight, T* values) {
  const Along &w = e.weight, &v = e.values;
  parallel_lines(v.lines(), v.units * kScattered, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t ahead = std::min(line + kLinesAhead, end - 1);
      prefetch_units(weight + w.line_offset(ahead), e.index, v.units, w.unit_stride);
      T *to = weight + w.line_offset(line), *from = values + v.line_offset(line);
      for (int64_t k = 0; k < v.units; ++k) std::swap(to[e.index[k] * w.unit_stride], from[k * v.unit_stride]);
    }
  });
}

struct CpuSwap {
  explicit CpuSwap(const Tensor&) {}

  void exchange(const Exchange& e, int64_t element_size, void* weight, void* values) const {
    visit_bits(element_size, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (e.values.units_last)
        swap_columns(e, static_cast<T*>(weight), static_cast<T*>(values));
      else
        swap_rows(e, static_cast<T*>(weight), static_cast<T*>(values));
    });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) { m.impl("swap_", TORCH_BOX(&s2ft::swap<s2ft::CpuSwap>)); }
