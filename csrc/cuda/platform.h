// How a .cu file launches a kernel. S2FT_CUDA_ON_CPU is set by the tests, which run the same kernels
// on the CPU; their header then stands in for the CUDA runtime.
#pragma once

#ifdef S2FT_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#define S2FT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define S2FT_SHARED(T, name, count) __shared__ T name[count]
#endif

#include <cstdint>

namespace s2ft {

constexpr int kThreads = 256;

// Blocks for `items` work items. Kernels stride over the grid, so any number is right; 64K keeps the
// largest GPU busy many times over.
inline int blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < 65536 ? blocks : 65536);
}

__device__ __forceinline__ int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t item_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// What one thread moves at once.
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
