#include "spans.h"

#include "clones.h"

namespace s2ft {

#define S2FT_DEFINE_ADD(W, D)                                                                             \
  S2FT_CLONES void add_span(const W* base, const D* delta, Wide<W, D> alpha, W* out, int64_t n) {         \
    using A = Wide<W, D>;                                                                                 \
    S2FT_INDEPENDENT                                                                                      \
    for (int64_t i = 0; i < n; ++i) {                                                                     \
      const A sum = plus_product(static_cast<A>(widen(base[i])), alpha, static_cast<A>(widen(delta[i]))); \
      out[i] = narrow<W>(sum);                                                                            \
    }                                                                                                     \
  }
#define S2FT_DEFINE_SUMS(T, A)                                                                             \
  S2FT_CLONES void widen_span(const T* from, A* sum, int64_t n) {                                          \
    for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<A>(widen(from[i]));                               \
  }                                                                                                        \
  S2FT_CLONES void accumulate_span(A* sum, const T* delta, A alpha, int64_t n) {                           \
    for (int64_t i = 0; i < n; ++i) sum[i] = plus_product(sum[i], alpha, static_cast<A>(widen(delta[i]))); \
  }                                                                                                        \
  S2FT_CLONES void narrow_span(const A* sum, T* to, int64_t n) {                                           \
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(sum[i]);                                             \
  }
S2FT_FOR_WEIGHTS_AND_DELTAS(S2FT_DEFINE_ADD)
S2FT_FOR_SUMS(S2FT_DEFINE_SUMS)

}  // namespace s2ft
