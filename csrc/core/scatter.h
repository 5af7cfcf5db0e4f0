// What scatter_add_ adds to what.
#pragma once

#include "along.h"

namespace s2ft {

// One delta and where its units go. No unit twice within a part; parts may share units.
struct Part {
  Along delta;
  const void* data;
  const int64_t* index;  // delta.units entries
  double alpha;
};

struct Scatter {
  Along weight;
  void* data;
  DType weight_type, delta_type;
  const Part* parts;
  int64_t count;  // of parts
};

}  // namespace s2ft
