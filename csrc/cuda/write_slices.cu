// Sums of slices: one launch for up to kMost of them, each with blocks of its own.
//
// One work item is one element of a slice, or Width neighbours if the weight and the dense buffers hold them side by
// side and aligned to 16 bytes. Items are numbered in the order of the dense buffers. Their accesses are therefore
// always coalesced, and the accesses to the weight are coalesced if its units are neighbours.
//
// Columns in an index are found one by one. A work item also takes Width neighbours of the dense buffers at a time. If the
// index names Width neighbours of the weight for them, as it does for attention heads, they are one access, and
// otherwise one access for each column. The kernel reads this from the index, so it holds for any index.
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

// A slice in a kernel's arguments, which have room for 4 KB.
template <class W, class D>
struct Task {
  Units units;
  W* weight;
  const W* base;
  const D* delta;
  bool wide;  // moves 16 bytes of the weight at once
};

constexpr int kMost = 32;

template <class W, class D>
struct Tasks {
  Task<W, D> at[kMost];
};

// Width elements that are neighbours in the weight.
template <int Width>
struct Neighbours {
  const int64_t offset;

  __device__ Neighbours(const Units& units, int64_t outer, int64_t first) : offset(units.offset(outer, first)) {}

  template <class W>
  __device__ void store(W* weight, const Pack<W, Width>& pack) const {
    if (offset >= 0) *reinterpret_cast<Pack<W, Width>*>(weight + offset) = pack;
  }
};

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

  template <class W>
  __device__ void store(W* weight, const Pack<W, Width>& pack) const {
    if (together) {
      *reinterpret_cast<Pack<W, Width>*>(weight + units.unit_offset(unit.at[0]) + row) = pack;
      return;
    }
#pragma unroll
    for (int i = 0; i < Width; ++i)
      if (units.inside(unit.at[i])) weight[units.unit_offset(unit.at[i]) + row] = pack.at[i];
  }
};

// Inlined, so that the task is read where the arguments are.
template <int Width, class Place, class W, class D>
__device__ __forceinline__ void run(const Task<W, D>& task) {
  const auto* base = reinterpret_cast<const Pack<W, Width>*>(task.base);
  const auto* delta = reinterpret_cast<const Pack<D, Width>*>(task.delta);
  const int64_t inner_items = task.units.inner / Width, items = task.units.total() / Width;
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t outer, inner;
    split(t, inner_items, &outer, &inner);
    const Pack<W, Width> before = base[t];
    const Pack<D, Width> change = delta[t];
    Pack<W, Width> total;
#pragma unroll
    for (int i = 0; i < Width; ++i) total.at[i] = add(before.at[i], change.at[i]);
    Place(task.units, outer, inner * Width).store(task.weight, total);
  }
}

template <class W, class D>
__global__ void write_tasks(Tasks<W, D> tasks) {
  constexpr int width = 16 / sizeof(W);
  const Task<W, D>& task = tasks.at[blockIdx.y];
  if (!task.wide)
    run<1, Neighbours<1>>(task);
  else if (task.units.index && !task.units.rows)
    run<width, Columns<width>>(task);
  else
    run<width, Neighbours<width>>(task);
}

// True if `width` neighbours of the slice can be moved at once: they are neighbours in the weight, aligned and in
// range, or columns of an index, which Columns looks at.
bool is_wide(const Slice& s, int64_t element_size) {
  const Units& units = s.units;
  if (units.inner_stride != 1 || units.inner % (16 / element_size) != 0) return false;
  if (!aligned16(s.weight) || !aligned16(s.base) || !aligned16(s.delta)) return false;
  if (!aligned16(units.outer_stride * element_size)) return false;
  if (units.rows) return true;
  if (units.index) return aligned16(units.index);
  return units.start >= 0 && units.start + units.inner <= units.limit && aligned16(units.start * element_size);
}

// Launches slices of one pair of types.
template <class W, class D>
int launch(const Slice* slices, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kMost) {
    const int64_t some = count - first < kMost ? count - first : kMost;
    Tasks<W, D> tasks{};
    int64_t most = 0;
    for (int64_t j = 0; j < some; ++j) {
      const Slice& s = slices[first + j];
      const bool wide = is_wide(s, sizeof(W));
      tasks.at[j] = {s.units, static_cast<W*>(s.weight), static_cast<const W*>(s.base), static_cast<const D*>(s.delta),
                     wide};
      const int64_t items = s.units.total() / (wide ? 16 / static_cast<int64_t>(sizeof(W)) : 1);
      if (items > most) most = items;
    }
    const dim3 grid(static_cast<unsigned>(blocks_for(most)), static_cast<unsigned>(some));
    S2FT_LAUNCH((write_tasks<W, D>), grid, kThreads, static_cast<cudaStream_t>(stream), tasks);
    if (const int error = static_cast<int>(cudaGetLastError())) return error;
  }
  return 0;
}

}  // namespace

int write_slices(const Slice* slices, int64_t count, void* stream) {
  int error = 0;
  for (int64_t first = 0, end; first < count && !error; first = end) {
    const Slice& s = slices[first];
    for (end = first + 1; end < count; ++end)
      if (slices[end].weight_type != s.weight_type || slices[end].delta_type != s.delta_type) break;
    visit(s.weight_type, [&](auto w) {
      visit(s.delta_type, [&](auto d) {
        error = launch<typename decltype(w)::type, typename decltype(d)::type>(slices + first, end - first, stream);
      });
    });
  }
  return error;
}

}  // namespace s2ft::cuda
