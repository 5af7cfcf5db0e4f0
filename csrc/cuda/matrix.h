// The product of small 16-bit matrices by a warp, on the tensor cores.
#pragma once

#include "pairs.h"

namespace s2ft {

// A warp holds matrices in fragments. A lane is at row = lane / 4 and column = lane % 4 of the warp.
struct Lane {
  int row, column;
  __device__ explicit Lane(int thread) : row(thread % 32 / 4), column(thread % 4) {}
};

// 16 x 16: pairs of neighbours in a row. Rows `row`, row + 8, row, row + 8; pairs `column` twice and column + 4 twice.
template <class T>
struct Left {
  Pair<T> at[4];
};

// 16 x 8: pairs of neighbours in a column. Pairs `column` and column + 4 of column `row`.
template <class T>
struct Right {
  Pair<T> at[2];
};

// 16 x 8: columns 2 * column and the next one, of row `row` and then of row + 8.
struct Sum {
  float at[4] = {};
};

// sum += left * right, by shuffles. Every lane of the warp must call it.
template <class T>
__device__ void add_product_by_shuffles(Sum& sum, const Left<T>& left, const Right<T>& right) {
  const Lane lane(static_cast<int>(threadIdx.x));
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int half = i / 4, pair = i % 4;
    const Floats above = widen(Pair<T>{__shfl_sync(~0u, left.at[2 * half].bits, 4 * lane.row + pair)});
    const Floats below = widen(Pair<T>{__shfl_sync(~0u, left.at[2 * half + 1].bits, 4 * lane.row + pair)});
    const Floats first = widen(Pair<T>{__shfl_sync(~0u, right.at[half].bits, 8 * lane.column + pair)});
    const Floats second = widen(Pair<T>{__shfl_sync(~0u, right.at[half].bits, 8 * lane.column + 4 + pair)});
    sum.at[0] += above.first * first.first + above.second * first.second;
    sum.at[1] += above.first * second.first + above.second * second.second;
    sum.at[2] += below.first * first.first + below.second * first.second;
    sum.at[3] += below.first * second.first + below.second * second.second;
  }
}

// sum += left * right.
#if defined(S2FT_CUDA_ON_CPU)
template <class T>
void add_product(Sum& sum, const Left<T>& left, const Right<T>& right) {
  simulator::add_product(sum.at, left.at, right.at);
}
#else
__device__ __forceinline__ void add_product(Sum& sum, const Left<BFloat16>& left, const Right<BFloat16>& right) {
#if S2FT_PTX(800)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left.at[0].bits), "r"(left.at[1].bits), "r"(left.at[2].bits), "r"(left.at[3].bits), "r"(right.at[0].bits),
        "r"(right.at[1].bits));
#else
  add_product_by_shuffles(sum, left, right);
#endif
}

__device__ __forceinline__ void add_product(Sum& sum, const Left<Half>& left, const Right<Half>& right) {
#if S2FT_PTX(800)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
      : "r"(left.at[0].bits), "r"(left.at[1].bits), "r"(left.at[2].bits), "r"(left.at[3].bits), "r"(right.at[0].bits),
        "r"(right.at[1].bits));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum.at[0]), "+f"(sum.at[1]), "+f"(sum.at[2]), "+f"(sum.at[3])
        : "r"(left.at[2 * half].bits), "r"(left.at[2 * half + 1].bits), "r"(right.at[half].bits));
#endif
}
#endif

}  // namespace s2ft
