// Kernels that check the simulator itself. One can run correctly, or with one of two faults that must be found. The
// other compares the product of matrices by shuffles, which GPUs without a product of bfloat16 run, with the simulator's.
#include "cuda/matrix.h"
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

// a [16, 16] and b [16, 8] are stored in rows, sums [2, 16, 8] too.
template <class T>
__global__ void multiply(const T* a, const T* b, float* sums) {
  const s2ft::Lane lane(static_cast<int>(threadIdx.x));
  s2ft::Left<T> left;
  s2ft::Right<T> right;
  for (int h = 0; h < 4; ++h) {
    const T* at = a + (lane.row + 8 * (h % 2)) * 16 + 2 * lane.column + 8 * (h / 2);
    left.at[h] = s2ft::pair_of(at[0], at[1]);
  }
  for (int h = 0; h < 2; ++h) {
    const T* at = b + (2 * lane.column + 8 * h) * 8 + lane.row;
    right.at[h] = s2ft::pair_of(at[0], at[8]);
  }
  s2ft::Sum sum[2];
  s2ft::add_product(sum[0], left, right);
  s2ft::add_product_by_shuffles(sum[1], left, right);
  for (int which = 0; which < 2; ++which)
    for (int i = 0; i < 4; ++i)
      sums[which * 128 + (lane.row + 8 * (i / 2)) * 8 + 2 * lane.column + i % 2] = sum[which].at[i];
}

}  // namespace

extern "C" int multiply(const s2ft::BFloat16* a, const s2ft::BFloat16* b, float* sums) {
  S2FT_LAUNCH(multiply<s2ft::BFloat16>, 1, 32, nullptr, a, b, sums);
  return cudaGetLastError();
}

extern "C" int block_sum(const float* in, float* out, int n, int fault) {
  S2FT_LAUNCH(sum_in_block, 1, 256, nullptr, in, out, n, fault);
  return cudaGetLastError();
}
