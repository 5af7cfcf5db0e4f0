// The kernel of swap_. One work item is one element of the values, or 16 bytes of them if the last dimension is dense
// and aligned in both tensors.
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

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
  const int64_t items = exchange.values.total();
  if (items == 0) return 0;
  S2FT_LAUNCH((exchange_items<T>), blocks_for(items), kThreads, static_cast<cudaStream_t>(stream), exchange,
              static_cast<T*>(weight), static_cast<T*>(values), items);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int exchange_units(const Exchange& exchange, int64_t element_size, void* weight, void* values, void* stream) {
  Exchange packed = exchange;
  const int64_t width = 16 / element_size;
  if (aligned16(weight) && aligned16(values) && in_packs(&packed.weight, width) && in_packs(&packed.values, width))
    return launch<Bytes16>(packed, weight, values, stream);
  int error = 0;
  visit_bits(element_size,
             [&](auto tag) { error = launch<typename decltype(tag)::type>(exchange, weight, values, stream); });
  return error;
}

}  // namespace s2ft::cuda
