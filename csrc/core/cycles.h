// A permutation as the cycles that move something. Applying it cycle by cycle needs one place of
// scratch and touches only what moves.
#pragma once

#include <cstdint>
#include <vector>

namespace s2ft {

struct Cycles {
  // Concatenated cycles: within one, position p[j] takes what is at p[j + 1], and the last takes
  // what was at p[0].
  std::vector<int64_t> positions;
  std::vector<int64_t> ends;  // where in `positions` each cycle ends

  bool empty() const { return positions.empty(); }
};

// False when `order` is no permutation of 0..size-1.
inline bool cycles_of(const int64_t* order, int64_t size, Cycles* cycles) {
  std::vector<bool> seen(static_cast<size_t>(size));
  for (int64_t p = 0; p < size; ++p) {
    if (order[p] < 0 || order[p] >= size || seen[order[p]]) return false;
    seen[order[p]] = true;
  }
  for (int64_t p = 0; p < size; ++p) {
    if (!seen[p] || order[p] == p) continue;
    for (int64_t q = p; seen[q]; q = order[q]) {
      seen[q] = false;
      cycles->positions.push_back(q);
    }
    cycles->ends.push_back(static_cast<int64_t>(cycles->positions.size()));
  }
  return true;
}

}  // namespace s2ft
