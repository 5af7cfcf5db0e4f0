// The kernels of multi_adapter_linear. A block handles a few tokens of one sequence. They have one adapter, so each
// value of the adapter is read once for all of them. A unit or an adapter out of range is skipped.
//
// A sequence's result does not depend on the other sequences of the batch: which block adds what, and in which order,
// depends on the sizes of its own tokens and adapter only.
#include <algorithm>

#include "launch.h"
#include "matrix.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

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

// The output or input that unit number k of the tile names, or -1.
__device__ __forceinline__ int64_t place_of(const Bank& bank, const Batch& batch, const Tile& tile, int64_t k) {
  const int64_t place = k < tile.units ? bank.index[tile.unit + k] : -1;
  return place < batch.limit(bank) ? place : -1;
}

// --- a few tokens --------------------------------------------------------------------------------------------------

constexpr int kBlockThreads = 128;
constexpr int kWarps = kBlockThreads / 32;
constexpr int kColumns = 16;                       // threads beside each other in a strip of outputs, for dim 1
constexpr int kGroups = kBlockThreads / kColumns;  // groups of threads that share the units, for dim 1
constexpr int kUnits = 64;                         // units whose factors a block holds at once, for dim 1
constexpr int kUnitBlocks = 16;                    // blocks that share an adapter's units, for dim 0

// dim 1. blockIdx.x selects tokens, and blockIdx.y a strip of outputs with Width outputs per thread. Every group of
// threads adds a part of the units, so that a single sequence occupies many blocks and threads. Shared memory holds the
// factors, which are the values of x at the units' inputs, and in the end the sums of the groups.
template <class T, int Width, int Tokens>
__global__ void add_inputs(Bank bank, Batch batch) {
  using A = Wide<T, T>;
  constexpr int kStrip = kColumns * Width;
  S2FT_SHARED(A, factor, (Tokens * kUnits));
  S2FT_SHARED(A, part, (kGroups * Tokens * kStrip));
  const Tile tile = tile_of<Tokens>(bank, batch, blockIdx.x);
  const int64_t strip = static_cast<int64_t>(blockIdx.y) * kStrip;
  const int column = threadIdx.x % kColumns * Width, group = threadIdx.x / kColumns;
  const bool mine = strip + column < batch.outputs;
  A sum[Tokens][Width] = {};
  for (int64_t first = 0; first < tile.units; first += kUnits) {
    for (int i = threadIdx.x; i < Tokens * kUnits; i += kBlockThreads) {
      const int t = i / kUnits;
      const int64_t input = t < tile.tokens ? place_of(bank, batch, tile, first + i % kUnits) : -1;
      factor[i] =
          input >= 0 ? static_cast<A>(widen(load<T, 1>(batch.x, (tile.token + t) * batch.inputs + input).at[0])) : A(0);
    }
    __syncthreads();
    const int count = static_cast<int>(tile.units - first < kUnits ? tile.units - first : kUnits);
#pragma unroll 4
    for (int k = group; k < count; k += kGroups) {
      if (!mine) continue;
      const Pack<T, Width> row = load<T, Width>(bank.values, (tile.unit + first + k) * bank.width + strip + column);
#pragma unroll
      for (int t = 0; t < Tokens; ++t)
#pragma unroll
        for (int e = 0; e < Width; ++e) sum[t][e] += factor[t * kUnits + k] * static_cast<A>(widen(row.at[e]));
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < Tokens; ++t)
#pragma unroll
    for (int e = 0; e < Width; ++e) part[(group * Tokens + t) * kStrip + column + e] = sum[t][e];
  __syncthreads();
  for (int i = threadIdx.x; i < Tokens * kStrip; i += kBlockThreads) {
    const int t = i / kStrip, output = i % kStrip;
    if (t >= tile.tokens || strip + output >= batch.outputs) continue;
    const int64_t place = (tile.token + t) * batch.outputs + strip + output;
    T result = load<T, 1>(batch.y, place).at[0];
    A total = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) total += part[g * Tokens * kStrip + i];
    if (tile.units) result = narrow<T>(static_cast<A>(widen(result)) + total);
    static_cast<T*>(batch.out)[place] = result;
  }
}

// dim 0, after out = y. blockIdx.x selects tokens. The warps take turns over the units, some at a time, so that x is
// read once for them and several loads are under way. A warp adds the tokens' dot products with a unit to the unit's
// output, which no other warp touches for these tokens.
template <class T, int Width, int Tokens>
__global__ void add_outputs(Bank bank, Batch batch) {
  using A = Wide<T, T>;
  constexpr int kSome = 4;
  const Tile tile = tile_of<Tokens>(bank, batch, blockIdx.x);
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kWarps * kSome;
  for (int64_t k = (blockIdx.y * kWarps + threadIdx.x / 32) * kSome; k < tile.units; k += step) {
    A dot[kSome][Tokens] = {};
    for (int64_t i = lane * Width; i < bank.width; i += 32 * Width) {
      Pack<T, Width> x[Tokens], row[kSome];
#pragma unroll
      for (int t = 0; t < Tokens; ++t)  // the last token again in place of one that does not exist
        x[t] = load<T, Width>(batch.x, (tile.token + (t < tile.tokens ? t : tile.tokens - 1)) * batch.inputs + i);
#pragma unroll
      for (int u = 0; u < kSome; ++u)
        row[u] = load<T, Width>(bank.values, (tile.unit + (k + u < tile.units ? k + u : k)) * bank.width + i);
#pragma unroll
      for (int u = 0; u < kSome; ++u)
#pragma unroll
        for (int t = 0; t < Tokens; ++t)
#pragma unroll
          for (int e = 0; e < Width; ++e)
            dot[u][t] += static_cast<A>(widen(row[u].at[e])) * static_cast<A>(widen(x[t].at[e]));
    }
#pragma unroll
    for (int u = 0; u < kSome; ++u)
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
#pragma unroll
        for (int mask = 16; mask; mask >>= 1) dot[u][t] += __shfl_xor_sync(~0u, dot[u][t], mask);
        const int64_t output = place_of(bank, batch, tile, k + u);
        if (lane || t >= tile.tokens || output < 0) continue;
        T* out = static_cast<T*>(batch.out) + (tile.token + t) * batch.outputs + output;
        *out = narrow<T>(static_cast<A>(widen(*out)) + dot[u][t]);
      }
  }
}

template <class T, int Width, int Tokens>
int launch(const Bank& bank, const Batch& batch, cudaStream_t stream) {
  const int64_t tiles = batch.sequences * ((batch.tokens + Tokens - 1) / Tokens);
  const int64_t strips = (batch.outputs + kColumns * Width - 1) / (kColumns * Width);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(bank.outputs ? kUnitBlocks : strips));
  if (bank.outputs)
    S2FT_LAUNCH((add_outputs<T, Width, Tokens>), grid, kBlockThreads, stream, bank, batch);
  else
    S2FT_LAUNCH((add_inputs<T, Width, Tokens>), grid, kBlockThreads, stream, bank, batch);
  return static_cast<int>(cudaGetLastError());
}

// --- many tokens, on the tensor cores ----------------------------------------------------------------------------

constexpr int kManyTokens = 64;  // of a block

// dim 1: tokens x units times units x outputs. A block has kManyTokens tokens and a strip of outputs. A warp has all
// tokens and 32 outputs. The units are taken kDepth at a time.
constexpr int kStripThreads = 256;
constexpr int kStripOutputs = 256;
constexpr int kDepth = 32;
constexpr int kFactorRow = kDepth / 2 + 4;    // pairs; the rows of a fragment are then in different banks
constexpr int kValueRow = kStripOutputs + 8;  // pairs of two units; likewise

// Stores the values of x at the inputs of the units first, first + 1, ...: [token][pair of units].
template <class T>
__device__ void store_factors(const Bank& bank, const Batch& batch, const Tile& tile, int64_t first, Pair<T>* factors) {
  const int pair = threadIdx.x % (kDepth / 2);
  const int64_t inputs[2] = {place_of(bank, batch, tile, first + 2 * pair),
                             place_of(bank, batch, tile, first + 2 * pair + 1)};
  constexpr int kStep = kStripThreads / (kDepth / 2);
  int token = threadIdx.x / (kDepth / 2);
  const T* row = static_cast<const T*>(batch.x) + (tile.token + token) * batch.inputs;
#pragma unroll
  for (int i = 0; i < kManyTokens / kStep; ++i, token += kStep, row += kStep * batch.inputs) {
    const bool exists = token < tile.tokens;
    T values[2] = {};
    if (exists & (inputs[0] >= 0)) values[0] = row[inputs[0]];
    if (exists & (inputs[1] >= 0)) values[1] = row[inputs[1]];
    factors[token * kFactorRow + pair] = pair_of(values[0], values[1]);
  }
}

// Stores the values of those units in the strip: [pair of units][output]. Output 8 c + e is at 64 (e / 2) + 2 c + e % 2.
// Threads then store beside each other here, and in the end a thread has 8 neighbours of the output.
template <class T>
__device__ void store_values(const Bank& bank, const Tile& tile, int64_t first, int64_t strip, Pair<T>* values) {
  const int column = threadIdx.x % 32;
  const bool mine = strip + column * 8 < bank.width;
#pragma unroll
  for (int i = 0; i < kDepth / 2 / (kStripThreads / 32); ++i) {
    const int pair = threadIdx.x / 32 + i * (kStripThreads / 32);
    const int64_t k = first + 2 * pair;
    const int64_t at = (tile.unit + k) * bank.width + strip + column * 8;
    Pack<Pair<T>, 4> upper{}, lower{};
    if (mine & (k < tile.units)) upper = load<Pair<T>, 4>(bank.values, at >> 1);
    if (mine & (k + 1 < tile.units)) lower = load<Pair<T>, 4>(bank.values, (at + bank.width) >> 1);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t u = upper.at[e].bits, l = lower.at[e].bits;
      *reinterpret_cast<Pack<Pair<T>, 2>*>(values + pair * kValueRow + 64 * e + 2 * column) = {
          Pair<T>{(u & 0xffffu) | l << 16}, Pair<T>{u >> 16 | (l & 0xffff0000u)}};
    }
  }
}

template <class T>
__device__ void write_outputs(const Batch& batch, const Tile& tile, int64_t output, const Lane& lane,
                              const Sum (&sum)[kManyTokens / 16][4]) {
  if (output >= batch.outputs) return;
#pragma unroll
  for (int i = 0; i < kManyTokens / 8; ++i) {
    const int token = lane.row + 8 * i;
    if (token >= tile.tokens) continue;
    const int64_t place = (tile.token + token) * batch.outputs + output;
    auto pack = load<Pair<T>, 4>(batch.y, place >> 1);
#pragma unroll
    for (int j = 0; tile.units && j < 4; ++j) {
      const Floats y = widen(pack.at[j]);
      const float* add = sum[i / 2][j].at + i % 2 * 2;
      pack.at[j] = rounded_pair<T>({y.first + add[0], y.second + add[1]});
    }
    reinterpret_cast<Pack<Pair<T>, 4>*>(batch.out)[place >> 3] = pack;
  }
}

template <class T>
__global__ void add_inputs_of_many(Bank bank, Batch batch) {
  S2FT_SHARED(Pair<T>, factors, (kManyTokens * kFactorRow));
  S2FT_SHARED(Pair<T>, values, (kDepth / 2 * kValueRow));
  const Tile tile = tile_of<kManyTokens>(bank, batch, blockIdx.x);
  const int64_t strip = static_cast<int64_t>(blockIdx.y) * kStripOutputs;
  const int warp = threadIdx.x / 32;
  const Lane lane(static_cast<int>(threadIdx.x));
  Sum sum[kManyTokens / 16][4];
  for (int64_t first = 0; first < tile.units; first += kDepth) {
    store_factors(bank, batch, tile, first, factors);
    store_values(bank, tile, first, strip, values);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      const int pair = 8 * step + lane.column;
      Right<T> right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) right[j].at[h] = values[(pair + 4 * h) * kValueRow + 64 * j + 8 * warp + lane.row];
#pragma unroll
      for (int i = 0; i < kManyTokens / 16; ++i) {
        Left<T> left;
#pragma unroll
        for (int h = 0; h < 4; ++h)
          left.at[h] = factors[(16 * i + lane.row + 8 * (h % 2)) * kFactorRow + pair + 4 * (h / 2)];
#pragma unroll
        for (int j = 0; j < 4; ++j) add_product(sum[i][j], left, right[j]);
      }
    }
    __syncthreads();
  }
  write_outputs<T>(batch, tile, strip + 32 * warp + 8 * lane.column, lane, sum);
}

// dim 0, after out = y: tokens x inputs times inputs x units. A block has kManyTokens tokens and kManyUnits units, a
// warp 32 of each. The inputs are taken kInputs at a time. The next ones are loaded while a product is computed.
constexpr int kManyUnits = 64;
constexpr int kInputs = 64;
constexpr int kInputRow = kInputs / 2 + 4;  // pairs; the rows of a fragment are then in different banks
constexpr int kPacks = kManyTokens * kInputs / 8 / kBlockThreads;
static_assert(kManyTokens == kManyUnits);

// Some columns of kManyTokens rows, spread over the block. Rows and columns that do not exist are 0.
template <class T>
struct Rows {
  Pack<Pair<T>, 4> at[kPacks];

  __device__ void load_from(const void* data, int64_t first_row, int64_t rows, int64_t width, int64_t column) {
    const int64_t c = column + threadIdx.x % 8 * 8;
    int row = threadIdx.x / 8;
    int64_t place = ((first_row + row) * width + c) >> 1;
#pragma unroll
    for (int i = 0; i < kPacks; ++i, row += kBlockThreads / 8, place += kBlockThreads / 16 * width)
      at[i] = (row < rows) & (c < width) ? load<Pair<T>, 4>(data, place) : Pack<Pair<T>, 4>{};
  }

  __device__ void store(Pair<T>* to) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      *reinterpret_cast<Pack<Pair<T>, 4>*>(to + (threadIdx.x / 8 + i * (kBlockThreads / 8)) * kInputRow +
                                           threadIdx.x % 8 * 4) = at[i];
  }
};

template <class T>
__device__ void multiply_rows(const Pair<T>* x, const Pair<T>* values, const Lane& lane, Sum (&sum)[2][4]) {
#pragma unroll
  for (int step = 0; step < kInputs / 16; ++step) {
    const int pair = 8 * step + lane.column;
    Right<T> right[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) right[j].at[h] = values[(8 * j + lane.row) * kInputRow + pair + 4 * h];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Left<T> left;
#pragma unroll
      for (int h = 0; h < 4; ++h) left.at[h] = x[(16 * i + lane.row + 8 * (h % 2)) * kInputRow + pair + 4 * (h / 2)];
#pragma unroll
      for (int j = 0; j < 4; ++j) add_product(sum[i][j], left, right[j]);
    }
  }
}

template <class T>
__global__ void add_outputs_of_many(Bank bank, Batch batch) {
  S2FT_SHARED(Pair<T>, x, (kManyTokens * kInputRow));
  S2FT_SHARED(Pair<T>, values, (kManyUnits * kInputRow));
  const Tile tile = tile_of<kManyTokens>(bank, batch, blockIdx.x);
  const Lane lane(static_cast<int>(threadIdx.x));
  const int my_token = threadIdx.x / 64 * 32, my_unit = threadIdx.x / 32 % 2 * 32;
  for (int64_t first = blockIdx.y * kManyUnits; first < tile.units; first += gridDim.y * kManyUnits) {
    Sum sum[2][4];
    Rows<T> next_x, next_values;
    next_x.load_from(batch.x, tile.token, tile.tokens, bank.width, 0);
    next_values.load_from(bank.values, tile.unit + first, tile.units - first, bank.width, 0);
    for (int64_t input = 0; input < bank.width; input += kInputs) {
      next_x.store(x);
      next_values.store(values);
      __syncthreads();
      next_x.load_from(batch.x, tile.token, tile.tokens, bank.width, input + kInputs);
      next_values.load_from(bank.values, tile.unit + first, tile.units - first, bank.width, input + kInputs);
      multiply_rows(x + my_token * kInputRow, values + my_unit * kInputRow, lane, sum);
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      const int64_t output = place_of(bank, batch, tile, first + my_unit + u / 2 * 8 + lane.column * 2 + u % 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = my_token + lane.row + 8 * i;
        if (token >= tile.tokens || output < 0) continue;
        T* out = static_cast<T*>(batch.out) + (tile.token + token) * batch.outputs + output;
        *out = narrow<T>(widen(*out) + sum[i / 2][u / 2].at[i % 2 * 2 + u % 2]);
      }
    }
  }
}

template <class T>
int launch_many(const Bank& bank, const Batch& batch, cudaStream_t stream) {
  const int64_t tiles = batch.sequences * ((batch.tokens + kManyTokens - 1) / kManyTokens);
  if (bank.outputs) {
    const int64_t most = (std::min(bank.units, batch.outputs) + kManyUnits - 1) / kManyUnits;  // units of an adapter
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(std::clamp<int64_t>(most, 1, kUnitBlocks)));
    S2FT_LAUNCH((add_outputs_of_many<T>), grid, kBlockThreads, stream, bank, batch);
  } else {
    const int64_t strips = (batch.outputs + kStripOutputs - 1) / kStripOutputs;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(strips));
    S2FT_LAUNCH((add_inputs_of_many<T>), grid, kStripThreads, stream, bank, batch);
  }
  return static_cast<int>(cudaGetLastError());
}

// --- the choice -----------------------------------------------------------------------------------------------------

// From this number on a tile of 64 tokens is at least a quarter full, and the tensor cores are faster by counts.
constexpr int64_t kFewTokens = 16;

template <class T, int Width>
int run(const Bank& bank, const Batch& batch, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2 && Width == 8)
    if (batch.tokens > kFewTokens) return launch_many<T>(bank, batch, stream);
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
