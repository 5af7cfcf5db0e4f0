// The arguments of swap_: units of a weight, and values of the weight's shape with another number of units.
#pragma once

#include "along.h"

namespace s2ft {

struct Exchange {
  Along weight, values;
  const int64_t* index;  // values.units entries: the unit of the weight that each unit of the values is exchanged with

  // Offsets of element number `flat` of the values in both tensors. Returns false if its unit is out of range.
  S2FT_HD bool offsets(int64_t flat, int64_t* w, int64_t* v) const {
    int64_t o, i, k;
    values.place(flat, &o, &i, &k);
    const int64_t unit = index[k];
    if (unit < 0 || unit >= weight.units) return false;
    *w = weight.offset(o, i, unit);
    *v = values.offset(o, i, k);
    return true;
  }
};

}  // namespace s2ft
