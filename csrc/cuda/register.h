// Registers the kernels of csrc/cuda with PyTorch. Importing the module does not: on a GPU or a driver that cannot run
// them every op would raise, where PyTorch's implementation works.
#pragma once

namespace s2ft {

void register_cuda();

}  // namespace s2ft
