// The kernels of scatter_add_. One work item is one element of a delta, or several neighbours if the weight and every
// delta hold them side by side and aligned to 16 bytes.
//
// If several parts name a unit, the item of the first part adds all of them and rounds once, and the items of the
// others do nothing. A kernel with one thread per unit finds the first part and the next ones beforehand.
#include <algorithm>
#include <vector>

#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

// A part, and the number of units of the parts before it.
struct Placed {
  Part part;
  int64_t begin;

  S2FT_HD int64_t end() const { return begin + part.delta.units; }
};

// All parts, in the GPU's memory. Their number is not limited.
struct Table {
  const Placed* at;
  int64_t count, units;  // units of all parts
};

// Some parts, as the argument of a kernel that stores them in the GPU's memory. A captured graph keeps the arguments of
// a kernel, but a copy from the host would read the host's memory again at every replay. 4 KiB of arguments always fit.
constexpr int kSome = 16;
struct Some {
  Placed at[kSome];
};
static_assert(sizeof(Some) + 64 <= 4096);

__global__ void store(Some some, Placed* to, int count) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = some.at[threadIdx.x];
}

constexpr int64_t kNone = -1;   // no later part names this unit
constexpr int64_t kLater = -2;  // an earlier part names this unit

// Units are numbered through all parts. link[f] is the number of the next entry with the same unit, or kNone.
// link[table.units + f] is kLater if an earlier part names the unit, otherwise kNone.
__global__ void link_units(Table table, int64_t* link) {
  for (int64_t f = first_item(); f < table.units; f += item_step()) {
    int64_t next = kNone, part = 0;
    while (f >= table.at[part].end()) ++part;
    const int64_t unit = table.at[part].part.index[f - table.at[part].begin];
    bool earlier = false;
    for (int64_t j = 0; j < table.count; ++j) {
      if (j == part || (j > part && next != kNone)) continue;
      const Placed& other = table.at[j];
      for (int64_t k = 0; k < other.part.delta.units; ++k) {
        if (other.part.index[k] != unit) continue;
        if (j < part)
          earlier = true;
        else
          next = other.begin + k;
        break;
      }
    }
    link[f] = next;
    link[table.units + f] = earlier ? kLater : kNone;
  }
}

// Saves the old values of a part's units, before any part is added.
template <class W, int Width>
__global__ void keep_part(Along weight, Part part, const W* data, int64_t items) {
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t o, i, k;
    part.replaced.place(t, &o, &i, &k);
    const int64_t unit = part.index[k];
    if (unit < 0 || unit >= weight.units) continue;
    reinterpret_cast<Pack<W, Width>*>(part.old)[part.replaced.offset(o, i, k)] =
        reinterpret_cast<const Pack<W, Width>*>(data)[weight.offset(o, i, unit)];
  }
}

// `mine` is part number `part`.
template <class W, class D, int Width>
__global__ void add_part(Along weight, Table table, Placed mine, int64_t part, const int64_t* link, W* data,
                         int64_t items) {
  using A = Wide<W, D>;
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t o, i, k;
    mine.part.delta.place(t, &o, &i, &k);
    const int64_t unit = mine.part.index[k];
    int64_t at = mine.begin + k;
    if (unit < 0 || unit >= weight.units || (link && link[table.units + at] == kLater)) continue;
    auto* place = reinterpret_cast<Pack<W, Width>*>(data) + weight.offset(o, i, unit);
    const Pack<W, Width> base = *place;
    A sum[Width];
#pragma unroll
    for (int e = 0; e < Width; ++e) sum[e] = static_cast<A>(widen(base.at[e]));
    const auto add = [&](const Placed& source, int64_t its_unit) {
      const Pack<D, Width> delta =
          reinterpret_cast<const Pack<D, Width>*>(source.part.data)[source.part.delta.offset(o, i, its_unit)];
#pragma unroll
      for (int e = 0; e < Width; ++e)
        sum[e] = plus_product(sum[e], static_cast<A>(source.part.alpha), static_cast<A>(widen(delta.at[e])));
    };
    add(mine, k);
    for (int64_t from = part; link && (at = link[at]) != kNone;) {
      while (at >= table.at[from].end()) ++from;
      add(table.at[from], at - table.at[from].begin);
    }
    Pack<W, Width> result;
#pragma unroll
    for (int e = 0; e < Width; ++e) result.at[e] = narrow<W>(sum[e]);
    *place = result;
  }
}

// The parts on the host.
using Parts = std::vector<Placed>;

// Copies the parts to `to`, and finds the units that several of them name. It is needed for two and more parts.
int link(const Parts& parts, Placed* to, const Table& table, int64_t* links, cudaStream_t queue) {
  for (size_t first = 0; first < parts.size(); first += kSome) {
    const size_t count = std::min<size_t>(kSome, parts.size() - first);
    Some some{};
    std::copy_n(parts.begin() + static_cast<int64_t>(first), count, some.at);
    S2FT_LAUNCH((store), 1, kSome, queue, some, to + first, static_cast<int>(count));
  }
  if (table.units) S2FT_LAUNCH((link_units), blocks_for(table.units), kThreads, queue, table, links);
  return static_cast<int>(cudaGetLastError());
}

template <class W, class D, int Width>
int launch(const Along& weight, const Parts& parts, void* data, bool keeps, void* scratch, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* to = static_cast<Placed*>(scratch);
  const Table table{to, static_cast<int64_t>(parts.size()), parts.back().end()};
  auto* links = parts.size() == 1 ? nullptr : reinterpret_cast<int64_t*>(to + parts.size());
  for (const Placed& placed : parts)
    if (const int64_t items = keeps ? placed.part.replaced.total() : 0)
      S2FT_LAUNCH((keep_part<W, Width>), blocks_for(items), kThreads, queue, weight, placed.part,
                  static_cast<const W*>(data), items);
  if (links)
    if (const int error = link(parts, to, table, links, queue)) return error;
  for (size_t part = 0; part < parts.size(); ++part) {
    const int64_t items = parts[part].part.delta.total();
    if (items)
      S2FT_LAUNCH((add_part<W, D, Width>), blocks_for(items), kThreads, queue, weight, table, parts[part],
                  static_cast<int64_t>(part), links, static_cast<W*>(data), items);
    if (const cudaError_t error = cudaGetLastError()) return static_cast<int>(error);
  }
  return 0;
}

Parts parts_of(const Scatter& s) {
  Parts parts;
  for (int64_t j = 0, begin = 0; j < s.count; ++j) {
    parts.push_back({s.parts[j], begin});
    begin = parts.back().end();
  }
  return parts;
}

template <class W, class D>
int run(const Scatter& s, void* scratch, void* stream) {
  constexpr int64_t width = 16 / sizeof(W);
  Parts parts = parts_of(s);
  if (parts.empty()) return 0;
  Along weight = s.weight;
  bool packed = aligned16(s.data) && in_packs(&weight, width);
  for (Placed& placed : parts) {
    Part& part = placed.part;
    packed = packed && aligned16(part.data) && in_packs(&part.delta, width) &&
             (!s.keeps || (aligned16(part.old) && in_packs(&part.replaced, width)));
  }
  if (packed) return launch<W, D, width>(weight, parts, s.data, s.keeps, scratch, stream);
  return launch<W, D, 1>(s.weight, parts_of(s), s.data, s.keeps, scratch, stream);
}

}  // namespace

int64_t scatter_scratch_bytes(const Scatter& s) {
  if (s.count < 2) return 0;
  int64_t units = 0;
  for (int64_t j = 0; j < s.count; ++j) units += s.parts[j].delta.units;
  return s.count * static_cast<int64_t>(sizeof(Placed)) + 2 * units * static_cast<int64_t>(sizeof(int64_t));
}

int scatter_add_units(const Scatter& s, void* scratch, void* stream) {
  int error = 0;
  visit(s.weight_type, [&](auto w) {
    visit(s.delta_type,
          [&](auto d) { error = run<typename decltype(w)::type, typename decltype(d)::type>(s, scratch, stream); });
  });
  return error;
}

}  // namespace s2ft::cuda
