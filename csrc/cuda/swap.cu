// The kernel of swap_. One work item is one element of the values, or the 16 bytes of several where
// the last dimension is dense and aligned on both sides.
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

struct alignas(16) Bytes16 {
  uint64_t part[2];
};

template <class T>
__global__ void exchange_items(Exchange exchange, T* weight, T* values, int64_t items) {
  for (int64_t t = first_item(); t < items; t += item_step()) {
    int64_t w, v;
    if (!exchange.offsets(t, &w, &v)) continue;
    const T held = weight[w];
    weight[w] = values[v];
    values[v] = held;
  }
}

template <class T>
int launch(const Exchange& exchange, void* weight, void* values, void* stream) {
  const int64_t items = exchange.total();
  if (items == 0) return 0;
  S2FT_LAUNCH((exchange_items<T>), blocks_for(items), kThreads, static_cast<cudaStream_t>(stream), exchange,
              static_cast<T*>(weight), static_cast<T*>(values), items);
  return static_cast<int>(cudaGetLastError());
}

// Counts in 16 bytes instead of elements; false where something is not a multiple of that.
bool in_16_bytes(Exchange* e, int64_t element_size, const void* weight, const void* values) {
  if (e->dim == 2 || e->weight_stride[2] != 1 || e->values_stride[2] != 1) return false;
  if (!aligned16(weight) || !aligned16(values) || !aligned16(e->size[2] * element_size)) return false;
  for (int d = 0; d < 2; ++d)
    if (!aligned16(e->weight_stride[d] * element_size) || !aligned16(e->values_stride[d] * element_size)) return false;
  const int64_t width = 16 / element_size;
  e->size[2] /= width;
  for (int d = 0; d < 2; ++d) {
    e->weight_stride[d] /= width;
    e->values_stride[d] /= width;
  }
  return true;
}

}  // namespace

int exchange_units(const Exchange& exchange, int64_t element_size, void* weight, void* values, void* stream) {
  Exchange wide = exchange;
  if (in_16_bytes(&wide, element_size, weight, values)) return launch<Bytes16>(wide, weight, values, stream);
  int error = 0;
  visit_bits(element_size, [&](auto tag) {
    error = launch<typename decltype(tag)::type>(exchange, weight, values, stream);
  });
  return error;
}

}  // namespace s2ft::cuda
