// Sums of slices. A line crosses all units: it is a column of the matrix if the units are rows, and a row if they are
// columns. Every thread handles all units of its lines, so that the last write wins for a unit that is named twice.
#include "../write_slices.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../linear.h"
#include "parallel.h"
#include "spans.h"

namespace s2ft {
namespace {

// Neighbouring units, which are one span of a line. A slice is one run, and a set of heads has one run per head.
// `offset` is that of the first unit in the weight.
struct Run {
  int64_t first, length, offset;
};

std::vector<Run> runs_of(const Units& u) {
  const int64_t units = u.rows ? u.outer : u.inner;
  if (!u.index) return {{0, units, u.unit_offset(u.start)}};
  std::vector<Run> runs;
  for (int64_t k = 0; k < units; ++k)
    if (k > 0 && u.index[k] == u.index[k - 1] + 1)
      ++runs.back().length;
    else
      runs.push_back({k, 1, u.unit_offset(u.index[k])});
  return runs;
}

// Calls f(element, dense, count, stride) for spans of `count` elements of some lines. A span starts at `element` in the
// weight, with `stride` between its elements, and at `dense` in the dense buffers.
template <class F>
void for_spans(const Units& u, const std::vector<Run>& runs, int64_t begin, int64_t end, const F& f) {
  if (u.rows) {
    for (int64_t k = 0; k < u.outer; ++k) f(u.offset(k, begin), k * u.inner + begin, end - begin, u.inner_stride);
    return;
  }
  for (int64_t line = begin; line < end; ++line)
    for (const Run& run : runs)
      f(line * u.outer_stride + run.offset, line * u.inner + run.first, run.length, u.inner_stride);
}

template <class W, class D>
void add_into(W* target, int64_t stride, const W* base, const D* delta, int64_t n) {
  // For a few elements the call would cost more than it saves.
  if (stride == 1 && n >= 16)
    add_span(base, delta, 1, target, n);
  else
    for (int64_t i = 0; i < n; ++i) target[i * stride] = add(base[i], delta[i]);
}

// Columns that are no neighbours. Copying them one by one, as spans of one element, would take five times as long.
class ScatteredColumns {
 public:
  // Whether there are columns with an index, and most runs of them are short.
  static bool fit(const Units& u) {
    if (u.rows || !u.index) return false;
    int64_t runs = 0;
    for (int64_t k = 0; k < u.inner; ++k) runs += k == 0 || u.index[k] != u.index[k - 1] + 1;
    return runs * kShortRun > u.inner;
  }

  explicit ScatteredColumns(const Units& u) : lines_(u.outer), stride_(u.outer_stride), offsets_(u.inner) {
    for (int64_t k = 0; k < u.inner; ++k) offsets_[k] = u.unit_offset(u.index[k]);
  }

  template <class W, class D>
  void write(W* weight, const W* base, const D* delta) const {
    const int64_t n = static_cast<int64_t>(offsets_.size());
    parallel_lines(lines_, n * kScattered, [&](int64_t begin, int64_t end) {
      std::vector<W> sums(n);
      for (int64_t line = begin; line < end; ++line) {
        if (line + kLinesAhead < end) prefetch_units(weight + (line + kLinesAhead) * stride_, offsets_.data(), n, 1);
        add_span(base + line * n, delta + line * n, 1, sums.data(), n);
        W* const to = weight + line * stride_;
        for (int64_t k = 0; k < n; ++k) to[offsets_[k]] = sums[k];
      }
    });
  }

 private:
  static constexpr int64_t kShortRun = 8;
  int64_t lines_, stride_;
  std::vector<int64_t> offsets_;
};

template <class W, class D>
void write_slice(const Units& units, W* weight, const W* base, const D* delta) {
  if (ScatteredColumns::fit(units)) return ScatteredColumns(units).write(weight, base, delta);
  const std::vector<Run> runs = runs_of(units);
  parallel_lines(units.rows ? units.inner : units.outer, units.rows ? units.outer : units.inner,
                 [&](int64_t begin, int64_t end) {
                   for_spans(units, runs, begin, end, [&](int64_t at, int64_t i, int64_t n, int64_t stride) {
                     add_into(weight + at, stride, base + i, delta + i, n);
                   });
                 });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void write(const Slice* slices, int64_t count) const {
    for (const Slice* s = slices; s != slices + count; ++s)
      visit(s->weight_type, [&](auto w) {
        visit(s->delta_type, [&](auto d) {
          using W = typename decltype(w)::type;
          using D = typename decltype(d)::type;
          write_slice(s->units, static_cast<W*>(s->weight), static_cast<const W*>(s->base),
                      static_cast<const D*>(s->delta));
        });
      });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) {
  m.impl("write_slices_", TORCH_BOX(&s2ft::write_slices<s2ft::Cpu>));
  m.impl("sliced_linear", TORCH_BOX(&s2ft::sliced_linear<s2ft::Cpu>));
  m.impl("sliced_linear_grad_x", TORCH_BOX(&s2ft::sliced_linear_grad_x<s2ft::Cpu>));
  m.impl("indexed_linear", TORCH_BOX(&s2ft::indexed_linear<s2ft::Cpu>));
  m.impl("indexed_linear_grad_x", TORCH_BOX(&s2ft::indexed_linear_grad_x<s2ft::Cpu>));
}
