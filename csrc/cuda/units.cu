// Kernels over the units of a weight, which sliced_linear and indexed_linear run before their product.
//
// One work item is one element of the set of units, or Width neighbours if the weight and the dense buffers hold them
// side by side and aligned to 16 bytes. Items are numbered in the order of the dense buffer. Its accesses are therefore
// always coalesced, and the accesses to the weight are coalesced if its units are neighbours.
//
// Columns in an index have a kernel of their own. It also takes Width neighbours of the dense buffers at a time. If the
// index names Width neighbours of the weight for them, as it does for attention heads, they are one access, and
// otherwise one access for each column. The kernel reads this from the index, so it holds for any index.
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

enum class Step : int { sum, put };

// One step at one place, which can load and store Width elements of the weight.
template <class W, class D, int Width, class Place>
__device__ void run_at(const Place& place, Step step, Pack<W, Width>* dense, const Pack<D, Width>* delta, W* weight) {
  if (step == Step::put) {
    place.store(weight, *dense);
    return;
  }
  const Pack<W, Width> base = place.load(weight);
  const Pack<D, Width> change = *delta;
  Pack<W, Width> total;
#pragma unroll
  for (int i = 0; i < Width; ++i) total.at[i] = add(base.at[i], change.at[i]);
  *dense = total;
}

// Width elements that are neighbours in the weight.
template <int Width>
struct Neighbours {
  const int64_t offset;

  template <class W>
  __device__ Pack<W, Width> load(const W* weight) const {
    return *reinterpret_cast<const Pack<W, Width>*>(weight + offset);
  }

  template <class W>
  __device__ void store(W* weight, const Pack<W, Width>& pack) const {
    *reinterpret_cast<Pack<W, Width>*>(weight + offset) = pack;
  }
};

template <class W, class D, int Width>
__global__ void for_units(Units units, Step step, Pack<W, Width>* dense, const Pack<D, Width>* delta, W* weight,
                          int64_t items) {
  const int64_t inner_items = units.inner / Width;
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t outer, inner;
    split(t, inner_items, &outer, &inner);
    const int64_t offset = units.offset(outer, inner * Width);
    if (offset >= 0) run_at(Neighbours<Width>{offset}, step, dense + t, delta + t, weight);
  }
}

// Width columns of one row of the weight, which the index names one after the other.
template <int Width>
struct Columns {
  const Units& units;
  const Pack<int64_t, Width> unit;
  const int64_t row;
  bool together;  // they are neighbours, aligned and in range

  __device__ Columns(const Units& all, int64_t outer, int64_t first)
      : units(all),
        unit(*reinterpret_cast<const Pack<int64_t, Width>*>(all.index + first)),
        row(outer * all.outer_stride) {
    together = unit.at[0] % Width == 0 && unit.at[0] >= 0 && unit.at[0] + Width <= units.limit;
#pragma unroll
    for (int i = 1; i < Width; ++i) together = together && unit.at[i] == unit.at[0] + i;
  }

  // Calls f(i, offset) for each column in range.
  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < Width; ++i)
      if (units.inside(unit.at[i])) f(i, units.unit_offset(unit.at[i]) + row);
  }

  template <class W>
  __device__ Pack<W, Width> load(const W* weight) const {
    if (together) return *reinterpret_cast<const Pack<W, Width>*>(weight + units.unit_offset(unit.at[0]) + row);
    Pack<W, Width> pack{};
    each([&](int i, int64_t offset) { pack.at[i] = weight[offset]; });
    return pack;
  }

  template <class W>
  __device__ void store(W* weight, const Pack<W, Width>& pack) const {
    if (together)
      *reinterpret_cast<Pack<W, Width>*>(weight + units.unit_offset(unit.at[0]) + row) = pack;
    else
      each([&](int i, int64_t offset) { weight[offset] = pack.at[i]; });
  }
};

template <class W, class D, int Width>
__global__ void for_columns(Units units, Step step, Pack<W, Width>* dense, const Pack<D, Width>* delta, W* weight,
                            int64_t items) {
  const int64_t inner_items = units.inner / Width;
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t outer, inner;
    split(t, inner_items, &outer, &inner);
    run_at(Columns<Width>(units, outer, inner * Width), step, dense + t, delta + t, weight);
  }
}

template <class W, class D, int Width>
int launch(const Units& units, Step step, const UnitsData& data, void* stream) {
  const int64_t items = units.total() / Width;
  if (items == 0) return 0;
  auto* dense = static_cast<Pack<W, Width>*>(data.dense);
  auto* delta = static_cast<const Pack<D, Width>*>(data.delta);
  auto* weight = static_cast<W*>(data.weight);
  const auto queue = static_cast<cudaStream_t>(stream);
  if constexpr (Width > 1) {
    if (units.index && !units.rows) {
      S2FT_LAUNCH((for_columns<W, D, Width>), blocks_for(items), kThreads, queue, units, step, dense, delta, weight,
                  items);
      return static_cast<int>(cudaGetLastError());
    }
  }
  S2FT_LAUNCH((for_units<W, D, Width>), blocks_for(items), kThreads, queue, units, step, dense, delta, weight, items);
  return static_cast<int>(cudaGetLastError());
}

// True if `width` neighbours of the set can be moved at once: they are neighbours in the weight, aligned and in range,
// or columns of an index, which for_columns() looks at.
bool wide(const Units& units, const UnitsData& data, int64_t element_size, int64_t width) {
  if (units.inner_stride != 1 || units.inner % width != 0) return false;
  if (!aligned16(data.weight) || !aligned16(data.dense) || !aligned16(data.delta)) return false;
  if (!aligned16(units.outer_stride * element_size)) return false;
  if (units.rows) return true;
  if (units.index) return aligned16(units.index);
  return units.start >= 0 && units.start + units.inner <= units.limit && aligned16(units.start * element_size);
}

template <class W, class D>
int run(const Units& units, Step step, const UnitsData& data, void* stream) {
  constexpr int width = 16 / sizeof(W);
  if (wide(units, data, sizeof(W), width)) return launch<W, D, width>(units, step, data, stream);
  return launch<W, D, 1>(units, step, data, stream);
}

int run(const Units& units, Step step, const UnitsData& data, void* stream) {
  int error = 0;
  visit(data.weight_type, [&](auto w) {
    visit(data.delta_type, [&](auto d) {
      error = run<typename decltype(w)::type, typename decltype(d)::type>(units, step, data, stream);
    });
  });
  return error;
}

}  // namespace

int sum_units(const Units& units, const UnitsData& data, void* stream) { return run(units, Step::sum, data, stream); }

int put_units(const Units& units, const UnitsData& data, void* stream) { return run(units, Step::put, data, stream); }

}  // namespace s2ft::cuda
