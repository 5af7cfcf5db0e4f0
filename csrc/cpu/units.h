// Kernels over the units of a weight, on the CPU. linear.h describes them.
#pragma once

#include "../checks.h"
#include "../core/units.h"

namespace s2ft {

struct Cpu {
  Cpu() = default;
  explicit Cpu(const Tensor&) {}
  void sum(const Units& units, const UnitsData& data) const;
  void put(const Units& units, const UnitsData& data) const;
};

}  // namespace s2ft
