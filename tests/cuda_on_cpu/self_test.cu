// A kernel that checks the simulator itself: it can run correctly, or with one of two faults that must be found.
#include "cuda_on_cpu.h"

namespace {

enum Fault { none = 0, missing_barrier = 1, divergent_barrier = 2 };

__global__ void sum_in_block(const float* in, float* out, int n, int fault) {
  S2FT_SHARED(float, part, 8);
  float value = static_cast<int>(threadIdx.x) < n ? in[threadIdx.x] : 0.0f;
  for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  if (fault == divergent_barrier && threadIdx.x >= 64) return;
  if (fault != missing_barrier) __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += part[w];
  *out = total;
}

}  // namespace

extern "C" int block_sum(const float* in, float* out, int n, int fault) {
  S2FT_LAUNCH(sum_in_block, 1, 256, nullptr, in, out, n, fault);
  return cudaGetLastError();
}
