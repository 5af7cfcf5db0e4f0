// The arguments of scatter_add_.
#pragma once

#include "along.h"

namespace s2ft {

// One delta and its units. A part names no unit twice, but several parts may name the same unit. `old` receives the
// units' values from before anything was added, in the weight's type; null if they are not kept.
struct Part {
  Along delta, replaced;
  const void* data;
  void* old;
  const int64_t* index;  // delta.units entries
  double alpha;
};

struct Scatter {
  Along weight;
  void* data;
  DType weight_type, delta_type;
  const Part* parts;
  int64_t count;  // number of parts
  bool keeps;     // true if the parts keep the old values
};

}  // namespace s2ft
