#include "../scatter_add.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "spans.h"

namespace s2ft {
namespace {

struct Source {
  int64_t part, k;  // unit k of a part
};

// All units that the parts name, without duplicates, so that a unit that several parts name is rounded once.
struct Targets {
  std::vector<int64_t> units;
  std::vector<int32_t> of;      // the target of every unit of every part, one part after the other
  std::vector<int64_t> begin;   // where the sources of each target begin, and the end of the last
  std::vector<Source> sources;  // the units that are added to each target, in the order of the parts

  int64_t count() const { return static_cast<int64_t>(units.size()); }
  const Source* first(int64_t t) const { return sources.data() + begin[t]; }
  const Source* last(int64_t t) const { return sources.data() + begin[t + 1]; }
};

Targets targets_of(const Scatter& s) {
  Targets targets;
  std::vector<int32_t> place(static_cast<size_t>(s.weight.units), -1);
  for (int64_t j = 0; j < s.count; ++j)
    for (int64_t k = 0; k < s.parts[j].delta.units; ++k) {
      int32_t& at = place[s.parts[j].index[k]];
      if (at < 0) {
        at = static_cast<int32_t>(targets.units.size());
        targets.units.push_back(s.parts[j].index[k]);
      }
      targets.of.push_back(at);
    }
  targets.begin.resize(targets.units.size() + 1);
  for (int32_t t : targets.of) ++targets.begin[t + 1];
  for (size_t t = 0; t < targets.units.size(); ++t) targets.begin[t + 1] += targets.begin[t];
  std::vector<int64_t> next = targets.begin;
  targets.sources.resize(targets.of.size());
  size_t f = 0;
  for (int64_t j = 0; j < s.count; ++j)
    for (int64_t k = 0; k < s.parts[j].delta.units; ++k) targets.sources[next[targets.of[f++]]++] = {j, k};
  return targets;
}

// Returns a dense copy of a strided span, which the kernels of spans.h need. A dense span is returned without a copy.
template <class T>
const T* gathered(const T* from, int64_t stride, int64_t n, T* scratch) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < n; ++i) scratch[i] = from[i * stride];
  return scratch;
}

template <class T>
void put_back(const T* from, T* to, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
}

// Copies one span of a target to the `old` buffer of each source.
template <class W>
void keep_sources(const Scatter& s, const Source* source, const Source* last, int64_t o, int64_t first, int64_t n,
                  const W* weight) {
  for (; source != last; ++source) {
    const Part& part = s.parts[source->part];
    put_back(weight, static_cast<W*>(part.old) + part.replaced.offset(o, first, source->k), part.replaced.inner_stride,
             n);
  }
}

// Adds the sources to one span of a target: in one pass if there is one source, otherwise through a sum that is rounded
// at the end.
template <class W, class D>
void add_sources(const Scatter& s, const Source* source, const Source* last, int64_t o, int64_t first, int64_t n,
                 W* weight) {
  using A = Wide<W, D>;
  A sum[kPiece];
  D scratch[kPiece];
  const bool one = last - source == 1;
  if (!one) widen_span(weight, sum, n);
  for (; source != last; ++source) {
    const Part& part = s.parts[source->part];
    const Along& d = part.delta;
    const D* delta =
        gathered(static_cast<const D*>(part.data) + d.offset(o, first, source->k), d.inner_stride, n, scratch);
    if (one)
      add_span(weight, delta, static_cast<A>(part.alpha), weight, n);
    else
      accumulate_span(sum, delta, static_cast<A>(part.alpha), n);
  }
  if (!one) narrow_span(sum, weight, n);
}

// Prefetches the span after this one and its sources.
template <class W, class D>
void prefetch_next(const Scatter& s, const Targets& targets, int64_t item, int64_t first, int64_t n) {
  const Along& w = s.weight;
  if (first + n < w.inner) {
    first += n;
  } else if (++item < targets.count() * w.outer) {
    first = 0;
  } else {
    return;
  }
  const int64_t t = item / w.outer, o = item % w.outer;
  n = std::min(kPiece, w.inner - first);
  prefetch_span<1>(static_cast<const W*>(s.data) + w.offset(o, first, targets.units[t]), n);
  for (const Source* source = targets.first(t); source != targets.last(t); ++source) {
    const Part& part = s.parts[source->part];
    prefetch_span<0>(static_cast<const D*>(part.data) + part.delta.offset(o, first, source->k), n);
  }
}

template <class W, class D>
void add_rows(const Scatter& s) {
  const Targets targets = targets_of(s);
  const Along& w = s.weight;
  parallel_spans(targets.count() * w.outer, w.inner, [&](int64_t item, int64_t first, int64_t n) {
    if (w.inner_stride == 1) prefetch_next<W, D>(s, targets, item, first, n);
    W scratch[kPiece];
    const int64_t t = item / w.outer, o = item % w.outer;
    W* weight = static_cast<W*>(s.data) + w.offset(o, first, targets.units[t]);
    W* span = w.inner_stride == 1 ? weight : scratch;
    gathered(weight, w.inner_stride, n, scratch);
    if (s.keeps) keep_sources(s, targets.first(t), targets.last(t), o, first, n, span);
    add_sources<W, D>(s, targets.first(t), targets.last(t), o, first, n, span);
    if (span != weight) put_back(span, weight, w.inner_stride, n);
  });
}

template <class W>
void keep_units(const Part& part, int64_t line, const W* weight, int64_t stride) {
  W* old = static_cast<W*>(part.old) + part.replaced.line_offset(line);
  for (int64_t k = 0; k < part.replaced.units; ++k) old[k * part.replaced.unit_stride] = weight[part.index[k] * stride];
}

template <class W, class D>
void add_columns(const Scatter& s) {
  using A = Wide<W, D>;
  const Targets targets = targets_of(s);
  const int64_t units = targets.count();
  const Along& w = s.weight;
  parallel_lines(w.lines(), units * kScattered, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(static_cast<size_t>(units));
    for (int64_t line = begin; line < end; ++line) {
      W* weight = static_cast<W*>(s.data) + w.line_offset(line);
      const int64_t ahead = std::min(line + kLinesAhead, end - 1);
      prefetch_units(static_cast<W*>(s.data) + w.line_offset(ahead), targets.units.data(), units, w.unit_stride);
      for (int64_t t = 0; t < units; ++t) sum[t] = static_cast<A>(widen(weight[targets.units[t] * w.unit_stride]));
      const int32_t* of = targets.of.data();
      for (int64_t j = 0; j < s.count; ++j) {
        const Part& part = s.parts[j];
        if (s.keeps) keep_units(part, line, weight, w.unit_stride);
        const D* delta = static_cast<const D*>(part.data) + part.delta.line_offset(line);
        const A alpha = static_cast<A>(part.alpha);
        for (int64_t k = 0; k < part.delta.units; ++k) {
          A& at = sum[*of++];
          at = plus_product(at, alpha, static_cast<A>(widen(delta[k * part.delta.unit_stride])));
        }
      }
      for (int64_t t = 0; t < units; ++t) weight[targets.units[t] * w.unit_stride] = narrow<W>(sum[t]);
    }
  });
}

struct CpuScatterAdd {
  explicit CpuScatterAdd(const Tensor&) {}

  void scatter_add(const Scatter& s, const Tensor&) const {
    visit(s.weight_type, [&](auto w) {
      visit(s.delta_type, [&](auto d) {
        using W = typename decltype(w)::type;
        using D = typename decltype(d)::type;
        s.weight.units_last ? add_columns<W, D>(s) : add_rows<W, D>(s);
      });
    });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) { m.impl("scatter_add_", TORCH_BOX(&s2ft::scatter_add<s2ft::CpuScatterAdd>)); }
