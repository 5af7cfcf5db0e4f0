// What scatter_add_ adds to what.
#pragma once

#include "along.h"

namespace s2ft {

// One delta and where its units go. No unit twice within a part; parts may share units. `replaced`, where it
// is given, receives what the units were before anything was added, in the weight's type.
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
  int64_t count;  // of parts
  bool keeps;     // the parts have room for what is replaced
};

}  // namespace s2ft
