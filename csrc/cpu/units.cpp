// A line crosses all units: it is a column of the matrix if the units are rows, and a row if they are columns. Every
// thread handles all units of its lines, so that the last write wins for a unit that is named twice.
#include "units.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "spans.h"

namespace s2ft {
namespace {

// Number of elements of a block, so that the saved values are still in the first-level cache when the sums are written.
constexpr int64_t kBlock = 4096;

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

// Calls f(element, dense, count, stride) for spans of `count` elements. A span starts at `element` in the weight, with
// `stride` between its elements, and at `dense` in the dense buffer.
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

// Calls f for the spans of each block of lines.
template <class F>
void for_blocks(const Units& u, const F& f) {
  const int64_t lines = u.rows ? u.inner : u.outer, units = u.rows ? u.outer : u.inner;
  if (units == 0) return;
  // Short spans of rows waste cache lines. Single lines of columns do not.
  const int64_t block = std::max<int64_t>(kBlock / units, u.rows ? 64 : 1);
  const std::vector<Run> runs = runs_of(u);
  parallel_lines(lines, units, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += block) {
      const int64_t e = std::min(end, b + block);
      for_spans(u, runs, b, e, f);
    }
  });
}

template <class T>
void copy_to(T* weight, int64_t stride, const T* dense, int64_t n) {
  if (stride == 1)
    std::copy(dense, dense + n, weight);
  else
    for (int64_t i = 0; i < n; ++i) weight[i * stride] = dense[i];
}

template <class W, class D>
void add_into(W* target, int64_t target_stride, const W* base, int64_t base_stride, const D* delta, int64_t n) {
  // For a few elements the call would cost more than it saves.
  if (target_stride == 1 && base_stride == 1 && n >= 16)
    add_span(base, delta, 1, target, n);
  else
    for (int64_t i = 0; i < n; ++i) target[i * target_stride] = add(base[i * base_stride], delta[i]);
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

  // Calls f(line of the weight, its units in the dense buffer, scratch for as many) for each line. f calls take and put.
  template <class T, class F>
  void for_lines(T* weight, const F& f) const {
    const int64_t n = static_cast<int64_t>(offsets_.size());
    parallel_lines(lines_, n * kScattered, [&](int64_t begin, int64_t end) {
      std::vector<std::remove_const_t<T>> scratch(n);
      for (int64_t line = begin; line < end; ++line) {
        if (line + kLinesAhead < end) prefetch_units(weight + (line + kLinesAhead) * stride_, offsets_.data(), n, 1);
        f(weight + line * stride_, line * n, scratch.data());
      }
    });
  }

  template <class T>
  void take(const T* line, T* dense) const {
    for (const int64_t offset : offsets_) *dense++ = line[offset];
  }

  template <class T>
  void put(T* line, const T* dense) const {
    for (const int64_t offset : offsets_) line[offset] = *dense++;
  }

  int64_t count() const { return static_cast<int64_t>(offsets_.size()); }

 private:
  static constexpr int64_t kShortRun = 8;
  int64_t lines_, stride_;
  std::vector<int64_t> offsets_;
};

template <class F>
void visit_both(const UnitsData& data, const F& f) {
  visit(data.weight_type, [&](auto w) { visit(data.delta_type, [&](auto d) { f(w, d); }); });
}

}  // namespace

void Cpu::sum(const Units& units, const UnitsData& data) const {
  visit_both(data, [&](auto w, auto d) {
    using W = typename decltype(w)::type;
    using D = typename decltype(d)::type;
    const W* weight = static_cast<const W*>(data.weight);
    W* dense = static_cast<W*>(data.dense);
    const D* delta = static_cast<const D*>(data.delta);
    if (ScatteredColumns::fit(units)) {
      const ScatteredColumns columns(units);
      return columns.for_lines(weight, [&](const W* line, int64_t i, W* base) {
        columns.take(line, base);
        add_span(base, delta + i, 1, dense + i, columns.count());
      });
    }
    for_blocks(units, [&](int64_t at, int64_t i, int64_t n, int64_t stride) {
      add_into(dense + i, 1, weight + at, stride, delta + i, n);
    });
  });
}

void Cpu::put(const Units& units, const UnitsData& data) const {
  visit_bits(size_of(data.weight_type), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* weight = static_cast<T*>(data.weight);
    const T* dense = static_cast<const T*>(data.dense);
    if (ScatteredColumns::fit(units)) {
      const ScatteredColumns columns(units);
      return columns.for_lines(weight, [&](T* line, int64_t i, T*) { columns.put(line, dense + i); });
    }
    for_blocks(units,
               [&](int64_t at, int64_t i, int64_t n, int64_t stride) { copy_to(weight + at, stride, dense + i, n); });
  });
}

}  // namespace s2ft
