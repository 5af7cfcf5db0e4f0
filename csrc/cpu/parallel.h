#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace s2ft {

// Elements one thread moves in about 100 µs. Sharing out less gains little when the cores are free
// and, measured with other work on them, costs 10 ms of waiting at the barrier.
constexpr int64_t kElementsPerThread = int64_t{256} << 10;

// An element that has a cache line to itself takes about as long as this many neighbours.
constexpr int64_t kScattered = 16;

// Runs f(begin, end) over 0..lines, on PyTorch's threads if there is enough to do. `f` must not throw.
template <class F>
void parallel_lines(int64_t lines, int64_t elements_per_line, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_line));
  if (lines <= grain) {
    if (lines > 0) f(int64_t{0}, lines);
  } else {
    torch::stable::parallel_for(0, lines, grain, f);
  }
}

// Asks for the scattered elements of a line that comes a little later, which no processor foresees:
// two to three times as fast.
constexpr int64_t kLinesAhead = 4;

template <class T>
void prefetch_units(const T* line, const int64_t* units, int64_t n, int64_t stride) {
#if defined(__GNUC__)
  for (int64_t k = 0; k < n; ++k) __builtin_prefetch(line + units[k] * stride, 1, 3);
#endif
}

// Asks for a span that is worked on next, to be written (1) or only read (0): the processor foresees the rest
// of a page at best.
template <int Write, class T>
void prefetch_span(const T* span, int64_t n) {
#if defined(__GNUC__)
  const char* bytes = reinterpret_cast<const char*>(span);
  for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(bytes + at, Write, 3);
#endif
}

constexpr int64_t kPiece = 2048;

// Runs f(item, first, n) over pieces of at most kPiece of the `length` elements of every item: small
// enough that threads share the work of one long item, and that scratch lies in the first-level cache.
template <class F>
void parallel_spans(int64_t items, int64_t length, const F& f) {
  const int64_t pieces = (length + kPiece - 1) / kPiece;
  parallel_lines(items * pieces, 2 * std::min(length, kPiece), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % pieces * kPiece;
      f(t / pieces, first, std::min(kPiece, length - first));
    }
  });
}

}  // namespace s2ft
