// Index arithmetic of swap_: a tensor of up to three dimensions against the values that trade
// places with some of its units. Fewer dimensions are padded in front with size 1.
#pragma once

#include "units.h"

namespace s2ft {

struct Exchange {
  const int64_t* index;
  int64_t limit;  // size of the weight along `dim`
  int64_t size[3];  // sizes of the values
  int64_t weight_stride[3], values_stride[3];
  int dim;

  S2FT_HD int64_t total() const { return size[0] * size[1] * size[2]; }

  // Offsets of element (a, b, c) of the values; false where its unit is out of range.
  S2FT_HD bool offsets(int64_t a, int64_t b, int64_t c, int64_t* weight, int64_t* values) const {
    *values = a * values_stride[0] + b * values_stride[1] + c * values_stride[2];
    int64_t at[3] = {a, b, c};
    const int64_t u = index[dim == 0 ? a : dim == 1 ? b : c];
    if (u < 0 || u >= limit) return false;
    *weight = (dim == 0 ? u : at[0]) * weight_stride[0] + (dim == 1 ? u : at[1]) * weight_stride[1] +
              (dim == 2 ? u : at[2]) * weight_stride[2];
    return true;
  }

  S2FT_HD bool offsets(int64_t flat, int64_t* weight, int64_t* values) const {
    int64_t ab, a, b, c;
    split(flat, size[2], &ab, &c);
    split(ab, size[1], &a, &b);
    return offsets(a, b, c, weight, values);
  }
};

}  // namespace s2ft
