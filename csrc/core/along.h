// A tensor of up to three dimensions seen along one of them: `units` places, each crossed by every line.
// No torch headers: CPU and CUDA kernels share this.
#pragma once

#include "units.h"

namespace s2ft {

struct Along {
  int64_t units, outer, inner;  // sizes; a line is a pair (outer, inner)
  int64_t unit_stride, outer_stride, inner_stride;
  bool units_last;  // the units are the last dimension: neighbours there are units, elsewhere lines

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

  // The place of the `flat`-th element, counted as the tensor's own dimensions are.
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

// What a kernel needs to move runs of `width` elements at once; false where the tensor does not allow it.
inline bool in_packs(Along* a, int64_t width) {
  if (a->units_last || a->inner_stride != 1) return false;
  if (a->inner % width || a->outer_stride % width || a->unit_stride % width) return false;
  a->inner /= width;
  a->outer_stride /= width;
  a->unit_stride /= width;
  return true;
}

}  // namespace s2ft
