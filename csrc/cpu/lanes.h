// Sixteen numbers, or eight doubles, as one of the compiler's vector types. The compiler maps it to the registers of
// the clone's processor.
#pragma once

#include "../core/numeric.h"
#include "clones.h"

namespace s2ft {

constexpr int kLaneBytes = 64;

template <class A>
struct Lanes {
  static constexpr int kCount = kLaneBytes / sizeof(A);
  typedef A Vector __attribute__((vector_size(kLaneBytes)));
};

template <class A>
using Vector = typename Lanes<A>::Vector;

template <class A, class T>
S2FT_INLINE Vector<A> load_lanes(const T* from) {
  Vector<A> lanes;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(&lanes, from, kLaneBytes);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Short __attribute__((vector_size(kLaneBytes / 2)));
    typedef uint32_t Word __attribute__((vector_size(kLaneBytes)));
    Short bits;
    std::memcpy(&bits, from, sizeof(bits));
    lanes = bits_as<Vector<A>>(__builtin_convertvector(bits, Word) << 16);
  } else {
    for (int l = 0; l < Lanes<A>::kCount; ++l) lanes[l] = static_cast<A>(widen(from[l]));
  }
  return lanes;
}

template <class A>
S2FT_INLINE void store_lanes(Vector<A> lanes, A* to) {
  std::memcpy(to, &lanes, kLaneBytes);
}

template <class A>
S2FT_INLINE A sum_of(Vector<A> lanes) {
  A sum = 0;
  for (int l = 0; l < Lanes<A>::kCount; ++l) sum += lanes[l];
  return sum;
}

}  // namespace s2ft
