// The kernels of multi_adapter_linear. A block handles a few tokens of one sequence. They have one adapter, so each
// value of the adapter is read once for all of them. A unit or an adapter out of range is skipped.
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

constexpr int kBlockThreads = 128;
constexpr int kWarps = kBlockThreads / 32;
constexpr int kUnits = 32;      // units whose factors a block holds at once
constexpr int kUnitBlocks = 8;  // blocks that share an adapter's units, for dim 0

// The tokens and the units of one block.
struct Tile {
  int64_t token, unit, units;
  int tokens;
};

template <int Tokens>
__device__ Tile tile_of(const Bank& bank, const Batch& batch, int64_t block) {
  const int64_t tiles = (batch.tokens + Tokens - 1) / Tokens;
  const int64_t sequence = block / tiles, first = block % tiles * Tokens, adapter = batch.adapter[sequence];
  const int64_t left = batch.tokens - first;
  Tile tile{sequence * batch.tokens + first, 0, 0, static_cast<int>(left < Tokens ? left : Tokens)};
  if (!bank.has(adapter)) return tile;
  const int64_t begin = bank.offsets[adapter], end = bank.offsets[adapter + 1];
  if (begin < 0 || end > bank.units || begin >= end) return tile;
  tile.unit = begin;
  tile.units = end - begin;
  return tile;
}

template <class T, int Width>
__device__ Pack<T, Width> load(const void* data, int64_t element) {
  return *reinterpret_cast<const Pack<T, Width>*>(static_cast<const T*>(data) + element);
}

// dim 1. blockIdx.x selects tokens, and blockIdx.y a strip of outputs with Width outputs per thread. Shared memory
// holds the factors, which are the values of x at the units' inputs.
template <class T, int Width, int Tokens>
__global__ void add_inputs(Bank bank, Batch batch) {
  using A = Wide<T, T>;
  S2FT_SHARED(A, factor, (Tokens * kUnits));
  const Tile tile = tile_of<Tokens>(bank, batch, blockIdx.x);
  const int64_t at = (static_cast<int64_t>(blockIdx.y) * kBlockThreads + threadIdx.x) * Width;
  const bool mine = at < batch.outputs;
  A sum[Tokens][Width] = {};
  for (int64_t first = 0; first < tile.units; first += kUnits) {
    for (int i = threadIdx.x; i < Tokens * kUnits; i += kBlockThreads) {
      const int t = i / kUnits, k = i % kUnits;
      const bool exists = t < tile.tokens && first + k < tile.units;
      const int64_t input = exists ? bank.index[tile.unit + first + k] : -1;
      const bool inside = input >= 0 && input < batch.inputs;
      factor[i] =
          inside ? static_cast<A>(widen(load<T, 1>(batch.x, (tile.token + t) * batch.inputs + input).at[0])) : A(0);
    }
    __syncthreads();
    const int count = static_cast<int>(tile.units - first < kUnits ? tile.units - first : kUnits);
    for (int k = 0; mine && k < count; ++k) {
      const Pack<T, Width> row = load<T, Width>(bank.values, (tile.unit + first + k) * bank.width + at);
#pragma unroll
      for (int t = 0; t < Tokens; ++t)
#pragma unroll
        for (int e = 0; e < Width; ++e) sum[t][e] += factor[t * kUnits + k] * static_cast<A>(widen(row.at[e]));
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < Tokens; ++t) {
    if (!mine || t >= tile.tokens) continue;
    const int64_t place = (tile.token + t) * batch.outputs + at;
    Pack<T, Width> result = load<T, Width>(batch.y, place);
#pragma unroll
    for (int e = 0; tile.units && e < Width; ++e)
      result.at[e] = narrow<T>(static_cast<A>(widen(result.at[e])) + sum[t][e]);
    *reinterpret_cast<Pack<T, Width>*>(static_cast<T*>(batch.out) + place) = result;
  }
}

// dim 0, after out = y. blockIdx.x selects tokens. The warps take turns over the units. A warp adds the tokens' dot
// products with a unit to the unit's output, which no other warp touches for these tokens.
template <class T, int Width, int Tokens>
__global__ void add_outputs(Bank bank, Batch batch) {
  using A = Wide<T, T>;
  const Tile tile = tile_of<Tokens>(bank, batch, blockIdx.x);
  const int lane = threadIdx.x % 32;
  for (int64_t k = blockIdx.y * kWarps + threadIdx.x / 32; k < tile.units; k += kUnitBlocks * kWarps) {
    const int64_t output = bank.index[tile.unit + k];
    A dot[Tokens] = {};
    for (int64_t i = lane * Width; i < bank.width; i += 32 * Width) {
      const Pack<T, Width> row = load<T, Width>(bank.values, (tile.unit + k) * bank.width + i);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
        if (t >= tile.tokens) continue;
        const Pack<T, Width> x = load<T, Width>(batch.x, (tile.token + t) * batch.inputs + i);
#pragma unroll
        for (int e = 0; e < Width; ++e) dot[t] += static_cast<A>(widen(row.at[e])) * static_cast<A>(widen(x.at[e]));
      }
    }
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
#pragma unroll
      for (int mask = 16; mask; mask >>= 1) dot[t] += __shfl_xor_sync(~0u, dot[t], mask);
      if (lane || t >= tile.tokens || output < 0 || output >= batch.outputs) continue;
      T* out = static_cast<T*>(batch.out) + (tile.token + t) * batch.outputs + output;
      *out = narrow<T>(static_cast<A>(widen(*out)) + dot[t]);
    }
  }
}

template <class T, int Width, int Tokens>
int launch(const Bank& bank, const Batch& batch, cudaStream_t stream) {
  const int64_t tiles = batch.sequences * ((batch.tokens + Tokens - 1) / Tokens);
  const int64_t strips = (batch.outputs + kBlockThreads * Width - 1) / (kBlockThreads * Width);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(bank.outputs ? kUnitBlocks : strips));
  if (bank.outputs)
    S2FT_LAUNCH((add_outputs<T, Width, Tokens>), grid, kBlockThreads, stream, bank, batch);
  else
    S2FT_LAUNCH((add_inputs<T, Width, Tokens>), grid, kBlockThreads, stream, bank, batch);
  return static_cast<int>(cudaGetLastError());
}

template <class T, int Width>
int run(const Bank& bank, const Batch& batch, cudaStream_t stream) {
  // Decoding has one token per sequence. The registers of further tokens would only hold zeros.
  return batch.tokens == 1 ? launch<T, Width, 1>(bank, batch, stream) : launch<T, Width, 4>(bank, batch, stream);
}

// True if the rows of the bank and of the tensors that it is multiplied with or added to can be read 16 bytes at a
// time.
template <class T>
bool wide(const Bank& bank, const Batch& batch) {
  if (!aligned16(bank.values) || !aligned16(bank.width * sizeof(T))) return false;
  return bank.outputs ? aligned16(batch.x) : aligned16(batch.y) && aligned16(batch.out);
}

}  // namespace

int add_adapters(const Bank& bank, const Batch& batch, DType dtype, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (bank.outputs) {
    const size_t bytes = static_cast<size_t>(batch.sequences * batch.tokens * batch.outputs * size_of(dtype));
    if (const cudaError_t error = cudaMemcpyAsync(batch.out, batch.y, bytes, cudaMemcpyDeviceToDevice, queue))
      return static_cast<int>(error);
  }
  int error = 0;
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = wide<T>(bank, batch) ? run<T, 16 / sizeof(T)>(bank, batch, queue) : run<T, 1>(bank, batch, queue);
  });
  return error;
}

}  // namespace s2ft::cuda
