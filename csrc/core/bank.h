// The adapters of one projection, and a batch with an adapter per sequence. This file includes no torch headers.
#pragma once

#include "units.h"

namespace s2ft {

// The units of all adapters, one adapter after the other. Adapter a has the units from offsets[a] to offsets[a + 1] -
// 1. A unit is a row of `values`: the weights of the inputs for dim 0, the values added to the outputs for dim 1.
struct Bank {
  const void* values;      // [units, width]
  const int64_t* index;    // [units]: the output (dim 0) or input (dim 1) of each unit
  const int64_t* offsets;  // [adapters + 1]
  int64_t adapters, units, width;
  bool outputs;  // true for dim 0

  S2FT_HD bool has(int64_t adapter) const { return adapter >= 0 && adapter < adapters; }
};

struct Batch {
  const void* x;           // [sequences, tokens, inputs]
  const void* y;           // [sequences, tokens, outputs]
  void* out;               // [sequences, tokens, outputs]
  const int64_t* adapter;  // [sequences], -1 for none
  int64_t sequences, tokens, inputs, outputs;

  S2FT_HD int64_t limit(const Bank& bank) const { return bank.outputs ? outputs : inputs; }
};

}  // namespace s2ft
