// Registers the kernels of csrc/cuda with PyTorch. The import of the module does not register them: on a GPU or driver
// that can't run them every op would raise, although the PyTorch implementation works.
#pragma once

namespace s2ft {

void register_cuda();

}  // namespace s2ft
