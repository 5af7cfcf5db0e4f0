#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace s2ft {

// Elements one thread moves in about 100 µs. Sharing out less gains little when the cores are free
// and, measured with other work on them, costs 10 ms of waiting at the barrier.
constexpr int64_t kElementsPerThread = int64_t{256} << 10;

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

}  // namespace s2ft
