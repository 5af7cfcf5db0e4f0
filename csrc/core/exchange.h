// What swap_ trades: units of a weight for values that have the weight's shape but for their number.
#pragma once

#include "along.h"

namespace s2ft {

struct Exchange {
  Along weight, values;
  const int64_t* index;  // values.units entries: where in the weight each unit of the values goes

  // Offsets of the `flat`-th element of the values on both sides; false where its unit is out of range.
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
