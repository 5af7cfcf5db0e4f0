// How a .cu file launches a kernel. The tests set S2FT_CUDA_ON_CPU and run the same kernels on the CPU, with their own
// header in place of the CUDA runtime.
#pragma once

#ifdef S2FT_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#define S2FT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define S2FT_SHARED(T, name, count) __shared__ alignas(16) T name[count]
#endif

#include <cstdint>

namespace s2ft {

constexpr int kThreads = 256;

// The number of blocks for `items` work items. Kernels stride over the grid, so every number is correct. 64K blocks are
// more than enough for the largest GPU.
inline int blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < 65536 ? blocks : 65536);
}

__device__ __forceinline__ int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t item_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The elements that one thread moves at once.
struct alignas(16) Bytes16 {
  uint64_t part[2];
};

template <class T, int Width>
struct alignas(sizeof(T) * Width < 16 ? sizeof(T) * Width : 16) Pack {
  T at[Width];
};

inline bool aligned16(int64_t bytes) { return (bytes & 15) == 0; }
inline bool aligned16(const void* pointer) {
  return aligned16(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)));
}

}  // namespace s2ft
