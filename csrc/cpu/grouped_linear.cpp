#include "../grouped_linear.h"

#include <torch/csrc/stable/library.h>

#include "units.h"

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&s2ft::grouped_linear<s2ft::Cpu>));
  m.impl("grouped_linear_grad_x", TORCH_BOX(&s2ft::grouped_linear_grad_x<s2ft::Cpu>));
}
