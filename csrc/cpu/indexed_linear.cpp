#include <torch/csrc/stable/library.h>

#include "../linear.h"
#include "units.h"

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) {
  m.impl("indexed_linear", TORCH_BOX(&s2ft::indexed_linear<s2ft::Cpu>));
  m.impl("indexed_linear_grad_x", TORCH_BOX(&s2ft::indexed_linear_grad_x<s2ft::Cpu>));
}
