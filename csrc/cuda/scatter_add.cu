// The kernels of scatter_add_. One work item is one element of a delta, or several neighbours where the weight
// and every delta hold them side by side and aligned to 16 bytes.
//
// Where several parts name a unit, the item of the first of them adds up all and rounds once; the others do
// nothing. Which comes first and which next is found beforehand, one thread a unit.
#include <algorithm>

#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

// A part as a kernel's argument; `begin` counts the units of the parts before it.
struct Parts {
  Part at[kMaxParts];
  int64_t begin[kMaxParts + 1];
  int count;
};

constexpr int64_t kNone = -1;   // no later part names this unit
constexpr int64_t kLater = -2;  // an earlier part does

// Units are numbered through all parts. link[f]: the number of the next with the same unit, or kNone;
// link[total + f]: kLater where an earlier part names the unit, else kNone.
__global__ void link_units(Parts parts, int64_t* link) {
  const int64_t total = parts.begin[parts.count];
  for (int64_t f = first_item(); f < total; f += item_step()) {
    int64_t next = kNone, part = 0;
    while (f >= parts.begin[part + 1]) ++part;
    const int64_t unit = parts.at[part].index[f - parts.begin[part]];
    bool earlier = false;
    for (int64_t j = 0; j < parts.count; ++j) {
      if (j == part || (j > part && next != kNone)) continue;
      for (int64_t k = 0; k < parts.at[j].delta.units; ++k) {
        if (parts.at[j].index[k] != unit) continue;
        if (j < part)
          earlier = true;
        else
          next = parts.begin[j] + k;
        break;
      }
    }
    link[f] = next;
    link[total + f] = earlier ? kLater : kNone;
  }
}

// What a part replaces, before any part is added.
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

template <class W, class D, int Width>
__global__ void add_parts(Along weight, Parts parts, int64_t part, const int64_t* link, W* data, int64_t items) {
  using A = Wide<W, D>;
  const Part& mine = parts.at[part];
  const int64_t total = parts.begin[parts.count];
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t o, i, k;
    mine.delta.place(t, &o, &i, &k);
    const int64_t unit = mine.index[k];
    int64_t at = parts.begin[part] + k;
    if (unit < 0 || unit >= weight.units || (link && link[total + at] == kLater)) continue;
    auto* place = reinterpret_cast<Pack<W, Width>*>(data) + weight.offset(o, i, unit);
    const Pack<W, Width> base = *place;
    A sum[Width];
#pragma unroll
    for (int e = 0; e < Width; ++e) sum[e] = static_cast<A>(widen(base.at[e]));
    for (int64_t from = part; at != kNone; at = link ? link[at] : kNone) {
      while (at >= parts.begin[from + 1]) ++from;
      const Part& source = parts.at[from];
      const Pack<D, Width> delta = reinterpret_cast<const Pack<D, Width>*>(
          source.data)[source.delta.offset(o, i, at - parts.begin[from])];
#pragma unroll
      for (int e = 0; e < Width; ++e)
        sum[e] = plus_product(sum[e], static_cast<A>(source.alpha), static_cast<A>(widen(delta.at[e])));
    }
    Pack<W, Width> result;
#pragma unroll
    for (int e = 0; e < Width; ++e) result.at[e] = narrow<W>(sum[e]);
    *place = result;
  }
}

template <class W, class D, int Width>
int launch(const Along& weight, const Parts& parts, void* data, bool keeps, int64_t* link, void* stream) {
  const int64_t total = parts.begin[parts.count];
  const auto queue = static_cast<cudaStream_t>(stream);
  if (parts.count == 1) link = nullptr;
  for (int j = 0; keeps && j < parts.count; ++j)
    if (const int64_t items = parts.at[j].replaced.total())
      S2FT_LAUNCH((keep_part<W, Width>), blocks_for(items), kThreads, queue, weight, parts.at[j],
                  static_cast<const W*>(data), items);
  if (link && total) S2FT_LAUNCH((link_units), blocks_for(total), kThreads, queue, parts, link);
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t items = parts.at[part].delta.total();
    if (items)
      S2FT_LAUNCH((add_parts<W, D, Width>), blocks_for(items), kThreads, queue, weight, parts, part, link,
                  static_cast<W*>(data), items);
    if (const cudaError_t error = cudaGetLastError()) return static_cast<int>(error);
  }
  return 0;
}

Parts parts_of(const Scatter& s) {
  Parts parts{};
  parts.count = static_cast<int>(s.count);
  for (int64_t j = 0; j < s.count; ++j) {
    parts.at[j] = s.parts[j];
    parts.begin[j + 1] = parts.begin[j] + s.parts[j].delta.units;
  }
  return parts;
}

template <class W, class D>
int run(const Scatter& s, int64_t* link, void* stream) {
  constexpr int64_t width = 16 / sizeof(W);
  Parts parts = parts_of(s);
  Along weight = s.weight;
  bool packed = aligned16(s.data) && in_packs(&weight, width);
  for (int j = 0; packed && j < parts.count; ++j)
    packed = aligned16(parts.at[j].data) && in_packs(&parts.at[j].delta, width) &&
             (!s.keeps || (aligned16(parts.at[j].old) && in_packs(&parts.at[j].replaced, width)));
  if (packed) return launch<W, D, width>(weight, parts, s.data, s.keeps, link, stream);
  return launch<W, D, 1>(s.weight, parts_of(s), s.data, s.keeps, link, stream);
}

}  // namespace

int scatter_add_units(const Scatter& s, int64_t* link, void* stream) {
  int error = 0;
  visit(s.weight_type, [&](auto w) {
    visit(s.delta_type, [&](auto d) {
      error = run<typename decltype(w)::type, typename decltype(d)::type>(s, link, stream);
    });
  });
  return error;
}

}  // namespace s2ft::cuda
