// Versions and errors of the CUDA runtime.
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
int built_version() { return CUDART_VERSION; }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace s2ft::cuda
