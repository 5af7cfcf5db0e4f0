#include "../permute.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "../core/cycles.h"
#include "parallel.h"

namespace s2ft {
namespace {

template <class T>
void copy_span(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1)
    std::copy(from, from + n, to);
  else
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

// Moves spans of `n` elements, `stride` apart, along the cycles. Neighbouring units are `step` apart.
template <class T>
void rotate(const Cycles& cycles, T* base, int64_t step, int64_t stride, int64_t n, T* scratch) {
  int64_t begin = 0;
  for (int64_t end : cycles.ends) {
    const int64_t* p = cycles.positions.data();
    copy_span(base + p[begin] * step, stride, scratch, 1, n);
    for (int64_t j = begin; j + 1 < end; ++j) copy_span(base + p[j + 1] * step, stride, base + p[j] * step, stride, n);
    copy_span(scratch, 1, base + p[end - 1] * step, stride, n);
    begin = end;
  }
}

// Number of elements of a row that are moved at once, small enough that all threads can share a wide row.
constexpr int64_t kBlock = 512;

template <class T>
void permute_rows(const Along& a, const Cycles& cycles, T* weight) {
  const int64_t blocks = (a.inner + kBlock - 1) / kBlock;
  parallel_lines(a.outer * blocks, cycles.moved() * std::min(kBlock, a.inner), [&](int64_t begin, int64_t end) {
    T scratch[kBlock];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % blocks * kBlock;
      rotate(cycles, weight + a.offset(t / blocks, first, 0), a.unit_stride, a.inner_stride,
             std::min(kBlock, a.inner - first), scratch);
    }
  });
}

// For few moved columns: moves single elements within each row.
template <class T>
void permute_few_columns(const Along& a, const Cycles& cycles, T* weight) {
  parallel_lines(a.lines(), cycles.moved(), [&](int64_t begin, int64_t end) {
    T scratch;
    for (int64_t line = begin; line < end; ++line) {
      const T* ahead = weight + a.line_offset(std::min(line + 1, end - 1));
      prefetch_units(ahead, cycles.positions.data(), cycles.moved(), a.unit_stride);
      rotate(cycles, weight + a.line_offset(line), a.unit_stride, 1, 1, &scratch);
    }
  });
}

// The new content of eight bytes of a row, gathered in a register, so that one store is enough.
template <class T, class Index>
uint64_t gathered_word(const T* row, const Index* order) {
  if constexpr (sizeof(T) == 8) {
    return row[order[0]];
  } else {
    uint64_t word = 0;
    for (size_t k = 0; k < 8 / sizeof(T); ++k) {
      const size_t place = std::endian::native == std::endian::little ? k : 8 / sizeof(T) - 1 - k;
      word |= static_cast<uint64_t>(row[order[k]]) << (8 * sizeof(T) * place);
    }
    return word;
  }
}

// For many moved columns: copies a row at the speed of memory, and gathers it back from the copy in the first-level
// cache. The next row is prefetched meanwhile.
template <class T, class Index>
void permute_row(const T* row, const T* next, const Index* order, int64_t n, T* out) {
  constexpr int64_t kLine = 64 / sizeof(T), kWord = 8 / sizeof(T);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch_span<0>(next + i, kLine);
    for (int64_t k = i; k < i + kLine; k += kWord) {
      const uint64_t word = gathered_word(row, order + k);
      std::memcpy(out + k, &word, sizeof(word));
    }
  }
  for (; i < n; ++i) out[i] = row[order[i]];
}

template <class Index, class T>
void permute_all_columns(const Along& a, const int64_t* order, T* weight) {
  const std::vector<Index> short_order(order, order + a.units);
  parallel_lines(a.lines(), a.units, [&](int64_t begin, int64_t end) {
    std::vector<T> row(static_cast<size_t>(a.units));
    for (int64_t line = begin; line < end; ++line) {
      T* at = weight + a.line_offset(line);
      std::memcpy(row.data(), at, row.size() * sizeof(T));
      permute_row(row.data(), weight + a.line_offset(std::min(line + 1, end - 1)), short_order.data(), a.units, at);
    }
  });
}

// The moves within a row: the places that receive another element, ascending, and the old place of that element.
template <class Index>
struct Moves {
  std::vector<Index> to, from;

  Moves(const Cycles& cycles, const int64_t* order) {
    std::vector<int64_t> places(cycles.positions);
    std::sort(places.begin(), places.end());
    to.assign(places.begin(), places.end());
    for (int64_t place : places) from.push_back(static_cast<Index>(order[place]));
  }
};

// For a part of the columns: gathers the moved elements into a buffer and writes them from there. Each block of
// elements also prefetches its share of the next row.
template <class T, class Index>
void permute_some_columns(const Along& a, const int64_t* order, const Cycles& cycles, T* weight) {
  constexpr int64_t kStep = 64;
  const Moves<Index> moves(cycles, order);
  const int64_t moved = cycles.moved(), share = a.units * kStep / moved + 1;
  parallel_lines(a.lines(), moved, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(static_cast<size_t>(moved));
    for (int64_t line = begin; line < end; ++line) {
      T* row = weight + a.line_offset(line);
      const T* next = weight + a.line_offset(std::min(line + 1, end - 1));
      for (int64_t i = 0, ahead = 0; i < moved; i += kStep, ahead += share) {
        prefetch_span<0>(next + std::min(ahead, a.units), std::clamp<int64_t>(a.units - ahead, 0, share));
        for (int64_t k = i; k < std::min(i + kStep, moved); ++k) buffer[k] = row[moves.from[k]];
      }
      for (int64_t k = 0; k < moved; ++k) row[moves.to[k]] = buffer[k];
    }
  });
}

template <class T, class Index>
void permute_columns(const Along& a, const int64_t* order, const Cycles& cycles, T* weight) {
  if (a.unit_stride != 1 || cycles.moved() < a.units / 20)
    permute_few_columns(a, cycles, weight);
  else if (cycles.moved() < a.units / 4)  // above this, almost every cache line is touched
    permute_some_columns<T, Index>(a, order, cycles, weight);
  else
    permute_all_columns<Index>(a, order, weight);
}

struct CpuPermute {
  explicit CpuPermute(const Tensor&) {}

  void permute(const Along& a, const int64_t* order, int64_t element_size, const Tensor& weight) const {
    const Cycles cycles = cycles_of(order, a.units);
    if (cycles.moved() == 0) return;
    void* data = weight.mutable_data_ptr();
    visit_bits(element_size, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (a.units_last)
        a.units <= std::numeric_limits<uint16_t>::max()
            ? permute_columns<T, uint16_t>(a, order, cycles, static_cast<T*>(data))
            : permute_columns<T, int64_t>(a, order, cycles, static_cast<T*>(data));
      else
        permute_rows(a, cycles, static_cast<T*>(data));
    });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) { m.impl("permute_", TORCH_BOX(&s2ft::permute<s2ft::CpuPermute>)); }
