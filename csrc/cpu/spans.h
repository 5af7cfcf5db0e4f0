// Sums over dense spans, in the processor's widest vectors. W is the type of a weight, D the type of a delta, and A the
// type of their sum. Products are rounded before they are added. `out` may be `base`.
#pragma once

#include <cstdint>

#include "../core/numeric.h"

namespace s2ft {

// Expands M(W, D) for all types of a weight and a delta.
#define S2FT_FOR_WEIGHTS_AND_DELTAS(M) \
  S2FT_FOR_DELTAS(M, float)            \
  S2FT_FOR_DELTAS(M, double)           \
  S2FT_FOR_DELTAS(M, Half)             \
  S2FT_FOR_DELTAS(M, BFloat16)
#define S2FT_FOR_DELTAS(M, W) M(W, float) M(W, double) M(W, Half) M(W, BFloat16)

// Expands M(T, A) for all types and the types of their sums.
#define S2FT_FOR_SUMS(M) \
  M(float, float)        \
  M(Half, float) M(BFloat16, float) M(float, double) M(double, double) M(Half, double) M(BFloat16, double)

#define S2FT_DECLARE_ADD(W, D) \
  void add_span(const W* base, const D* delta, Wide<W, D> alpha, W* out, int64_t n);  // base + alpha * delta
#define S2FT_DECLARE_SUMS(T, A)                                                                \
  void widen_span(const T* from, A* sum, int64_t n);                                           \
  void accumulate_span(A* sum, const T* delta, A alpha, int64_t n); /* sum += alpha * delta */ \
  void narrow_span(const A* sum, T* to, int64_t n);
S2FT_FOR_WEIGHTS_AND_DELTAS(S2FT_DECLARE_ADD)
S2FT_FOR_SUMS(S2FT_DECLARE_SUMS)
#undef S2FT_DECLARE_ADD
#undef S2FT_DECLARE_SUMS

}  // namespace s2ft
