// The places of units in a weight. This file includes no torch headers, because CPU and CUDA kernels share it.
#pragma once

#include "numeric.h"

namespace s2ft {

// Splits a flat position into outer and inner. 64-bit division is slow on a GPU, and almost every slice fits into 32
// bits.
S2FT_HD void split(int64_t flat, int64_t inner_size, int64_t* outer, int64_t* inner) {
  if (((flat | inner_size) >> 32) == 0) {
    const uint32_t f = static_cast<uint32_t>(flat), n = static_cast<uint32_t>(inner_size);
    const uint32_t o = f / n;
    *outer = o;
    *inner = f - o * n;
  } else {
    *outer = flat / inner_size;
    *inner = flat - *outer * inner_size;
  }
}

// A set of rows (rows = true) or columns of a matrix. `outer` and `inner` are the two sizes of the set, in the order of
// the matrix's dimensions. Stored densely, the set has the shape of a delta: (units, I) for rows, (O, units) for
// columns.
struct Units {
  const int64_t* index;  // the units, or null if they are start, start + 1, ...
  int64_t start;
  int64_t limit;  // number of rows or columns of the matrix
  int64_t outer, inner;
  int64_t outer_stride, inner_stride;
  bool rows;

  S2FT_HD int64_t unit(int64_t k) const { return index ? index[k] : start + k; }
  S2FT_HD bool inside(int64_t u) const { return u >= 0 && u < limit; }
  S2FT_HD int64_t total() const { return outer * inner; }

  // Offset of the first element of unit u.
  S2FT_HD int64_t unit_offset(int64_t u) const { return u * (rows ? outer_stride : inner_stride); }

  // Offset in the matrix of element (o, i) of the set, or -1 if the unit is out of range.
  S2FT_HD int64_t offset(int64_t o, int64_t i) const {
    const int64_t u = unit(rows ? o : i);
    if (!inside(u)) return -1;
    return unit_offset(u) + (rows ? i * inner_stride : o * outer_stride);
  }
};

// Units of one weight, and what is written there: weight = base + delta. `base` and `delta` are dense, with the set's
// shape.
struct Slice {
  Units units;
  DType weight_type, delta_type;
  void* weight;
  const void* base;
  const void* delta;
};

}  // namespace s2ft
