// The few runtime calls of driver.cu besides launches: memory and streams. On the CPU they are ordinary memory, so that
// the compiler's address sanitizer sees an access outside a buffer.
#pragma once

#include "cuda/platform.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef S2FT_CUDA_ON_CPU
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <class T>
cudaError_t cudaMalloc(T** at, size_t bytes) {
  *at = static_cast<T*>(std::malloc(bytes));
  if (*at) std::memset(*at, 0xff, bytes);  // NaN, so that a value that no kernel wrote is seen
  return *at ? cudaSuccess : cudaErrorLaunchFailure;
}
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
#endif

// Ends the program with status 2 if a runtime call failed.
inline void must(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", call, cudaGetErrorString(error));
  std::exit(2);
}

// An allocation of exactly `size` elements, so that memcheck sees an access one element behind its end. PyTorch's
// allocator hides it, because it rounds sizes up.
template <class T>
class Buffer {
 public:
  // Not initialised, so that initcheck sees a read before the first write.
  explicit Buffer(size_t size) : size_(size) { must(cudaMalloc(&at_, size ? size * sizeof(T) : 1), "cudaMalloc"); }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    must(cudaMemcpy(at_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(at_); }

  T* at() const { return at_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    must(cudaMemcpy(values.data(), at_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy to the host");
    return values;
  }

 private:
  T* at_ = nullptr;
  size_t size_;
};
