// A permutation as its cycles of length two and more. Applying it cycle by cycle needs one place of scratch memory and
// touches only the elements that move.
#pragma once

#include <cstdint>
#include <vector>

namespace s2ft {

struct Cycles {
  // The cycles, one after the other. In a cycle p, position p[j] receives the element at p[j + 1], and the last
  // position receives the element that was at p[0].
  std::vector<int64_t> positions;
  std::vector<int64_t> ends;  // where in `positions` each cycle ends

  int64_t moved() const { return static_cast<int64_t>(positions.size()); }
};

// `order` must be a permutation of 0..size-1.
inline Cycles cycles_of(const int64_t* order, int64_t size) {
  Cycles cycles;
  std::vector<bool> done(static_cast<size_t>(size));
  for (int64_t p = 0; p < size; ++p) {
    if (done[p] || order[p] == p) continue;
    for (int64_t q = p; !done[q]; q = order[q]) {
      done[q] = true;
      cycles.positions.push_back(q);
    }
    cycles.ends.push_back(static_cast<int64_t>(cycles.positions.size()));
  }
  return cycles;
}

}  // namespace s2ft
