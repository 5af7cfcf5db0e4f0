// A tensor with up to three dimensions, seen along one of them. It has `units` places, and every line has one element
// at each place. This file includes no torch headers, because CPU and CUDA kernels share it.
#pragma once

#include "units.h"

namespace s2ft {

struct Along {
  int64_t units, outer, inner;  // sizes; a line is a pair (outer, inner)
  int64_t unit_stride, outer_stride, inner_stride;
  bool units_last;  // the units are the last dimension, so neighbouring elements belong to neighbouring units

  S2FT_HD int64_t lines() const { return outer * inner; }
  S2FT_HD int64_t total() const { return units * outer * inner; }
  S2FT_HD int64_t offset(int64_t o, int64_t i, int64_t unit) const {
    return o * outer_stride + i * inner_stride + unit * unit_stride;
  }
  S2FT_HD int64_t line_offset(int64_t line) const {
    int64_t o, i;
    split(line, inner, &o, &i);
    return o * outer_stride + i * inner_stride;
  }

  // The place of element number `flat`, counted in the order of the tensor's dimensions.
  S2FT_HD void place(int64_t flat, int64_t* o, int64_t* i, int64_t* unit) const {
    int64_t rest;
    if (units_last) {
      split(flat, units, &rest, unit);
      split(rest, inner, o, i);
    } else {
      split(flat, inner, &rest, i);
      split(rest, units, o, unit);
    }
  }
};

// Rewrites `a` so that a kernel moves `width` elements at once. Returns false if the tensor does not allow it.
inline bool in_packs(Along* a, int64_t width) {
  if (a->units_last || a->inner_stride != 1) return false;
  if (a->inner % width || a->outer_stride % width || a->unit_stride % width) return false;
  a->inner /= width;
  a->outer_stride /= width;
  a->unit_stride /= width;
  return true;
}

}  // namespace s2ft
