// Many adapters of one projection, and a batch whose sequences name theirs. No torch headers.
#pragma once

#include "units.h"

namespace s2ft {

// The adapters' units follow each other: those of adapter a are offsets[a] to offsets[a + 1]. A unit is a
// row of `values`: for dim 0 what it weighs the inputs with, for dim 1 what it adds to the outputs.
struct Bank {
  const void* values;      // [units, width]
  const int64_t* index;    // [units]: the output (dim 0) or input (dim 1) that a unit is
  const int64_t* offsets;  // [adapters + 1]
  int64_t adapters, units, width;
  bool outputs;  // dim 0: units are outputs

  S2FT_HD bool has(int64_t adapter) const { return adapter >= 0 && adapter < adapters; }
};

struct Batch {
  const void* x;           // [sequences, tokens, inputs]
  const void* y;           // [sequences, tokens, outputs]
  void* out;               // as y
  const int64_t* adapter;  // [sequences], -1: none
  int64_t sequences, tokens, inputs, outputs;

  S2FT_HD int64_t limit(const Bank& bank) const { return bank.outputs ? outputs : inputs; }
};

}  // namespace s2ft
