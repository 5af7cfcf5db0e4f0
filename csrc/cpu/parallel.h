// Loops on PyTorch's threads, and prefetching.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace s2ft {

// The number of elements that one thread moves in about 100 µs. Smaller shares gain little if the cores are free, and
// cost 10 ms of waiting at the barrier if the cores have other work (measured).
constexpr int64_t kElementsPerThread = int64_t{256} << 10;

// An element on a cache line of its own takes about as long as this many neighbouring elements.
constexpr int64_t kScattered = 16;

// Runs f(begin, end) over the range 0 to lines, on PyTorch's threads if there is enough work. `f` must not throw.
template <class F>
void parallel_lines(int64_t lines, int64_t elements_per_line, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_line));
  if (lines <= grain) {
    if (lines > 0) f(int64_t{0}, lines);
  } else {
    torch::stable::parallel_for(0, lines, grain, f);
  }
}

// The scattered elements of a line are prefetched this many lines ahead, because processors can't predict them. This is
// two to three times as fast.
constexpr int64_t kLinesAhead = 4;

template <class T>
void prefetch_units(const T* line, const int64_t* units, int64_t n, int64_t stride) {
#if defined(__GNUC__)
  for (int64_t k = 0; k < n; ++k) __builtin_prefetch(line + units[k] * stride, 1, 3);
#endif
}

// Prefetches the next span, to be written (Write = 1) or only read (0). The processor's own prefetching ends with the
// page.
template <int Write, class T>
void prefetch_span(const T* span, int64_t n) {
#if defined(__GNUC__)
  const char* bytes = reinterpret_cast<const char*>(span);
  for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(bytes + at, Write, 3);
#endif
}

constexpr int64_t kPiece = 2048;

// Runs f(item, first, n) over the `length` elements of every item, in pieces of at most kPiece elements. The pieces are
// so small that several threads can share one long item and that scratch memory fits into the first-level cache.
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
