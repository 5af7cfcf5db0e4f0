// The kernel of permute_. A bounded number of lines is moved at a time, through a scratch buffer. One launch copies
// their moved units into the buffer in the new order, and the next copies them back. All threads have work for every
// permutation, and no second matrix is needed.
#include <algorithm>

#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

// Items are numbered in the order of the weight's dimensions, so that one side of each copy is coalesced. A unit out of
// range is skipped in both directions.
template <class T>
__global__ void move_items(Along a, const int64_t* order, bool take, int64_t first_line, int64_t lines, T* scratch,
                           T* weight) {
  const int64_t items = a.units * lines;
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t line, unit;
    if (a.units_last)
      split(t, a.units, &line, &unit);
    else
      split(t, lines, &unit, &line);
    const int64_t from = order[unit];
    if (from == unit || from < 0 || from >= a.units) continue;
    T* at = weight + a.line_offset(first_line + line);
    if (take)
      scratch[t] = at[from * a.unit_stride];
    else
      at[unit * a.unit_stride] = scratch[t];
  }
}

template <class T>
int run(const Along& a, const int64_t* order, void* weight, void* scratch, int64_t scratch_bytes, void* stream) {
  const int64_t at_once = std::max<int64_t>(1, scratch_bytes / (a.units * static_cast<int64_t>(sizeof(T))));
  for (int64_t first = 0; first < a.lines(); first += at_once) {
    const int64_t lines = std::min(at_once, a.lines() - first);
    for (const bool take : {true, false})
      S2FT_LAUNCH((move_items<T>), blocks_for(a.units * lines), kThreads, static_cast<cudaStream_t>(stream), a, order,
                  take, first, lines, static_cast<T*>(scratch), static_cast<T*>(weight));
    if (const cudaError_t error = cudaGetLastError()) return static_cast<int>(error);
  }
  return 0;
}

}  // namespace

int64_t permute_scratch_bytes(const Along& a, int64_t element_size) {
  const int64_t row = a.units * 16, all = a.total() * element_size;  // 16 bytes, because lines may be moved in packs
  return std::max(row, std::min(all, int64_t{16} << 20));
}

int permute_units(const Along& a, const int64_t* order, int64_t element_size, void* weight, void* scratch,
                  int64_t scratch_bytes, void* stream) {
  if (a.total() == 0) return 0;
  Along packed = a;
  if (aligned16(weight) && in_packs(&packed, 16 / element_size))
    return run<Bytes16>(packed, order, weight, scratch, scratch_bytes, stream);
  int error = 0;
  visit_bits(element_size, [&](auto tag) {
    error = run<typename decltype(tag)::type>(a, order, weight, scratch, scratch_bytes, stream);
  });
  return error;
}

}  // namespace s2ft::cuda
