#include "../swap.h"

#include <torch/csrc/stable/library.h>

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

// One row of the last dimension. Its elements are evenly spaced unless they are the units.
template <class T>
void swap_row(const Exchange& e, int64_t a, int64_t b, T* weight, T* values) {
  int64_t w, v;
  if (e.dim != 2) {
    if (e.offsets(a, b, 0, &w, &v)) swap_spans(weight + w, e.weight_stride[2], values + v, e.values_stride[2], e.size[2]);
    return;
  }
  for (int64_t c = 0; c < e.size[2]; ++c)
    if (e.offsets(a, b, c, &w, &v)) std::swap(weight[w], values[v]);
}

struct CpuSwap {
  explicit CpuSwap(const Tensor&) {}

  void exchange(const Exchange& e, int64_t element_size, void* weight, void* values) const {
    if (e.total() == 0) return;
    visit_bits(element_size, [&](auto tag) {
      using T = typename decltype(tag)::type;
      parallel_lines(e.size[0] * e.size[1], e.size[2], [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          swap_row(e, row / e.size[1], row % e.size[1], static_cast<T*>(weight), static_cast<T*>(values));
      });
    });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) { m.impl("swap_", TORCH_BOX(&s2ft::swap<s2ft::CpuSwap>)); }
