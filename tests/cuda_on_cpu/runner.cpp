// The launchers of csrc/cuda with a C interface, for ctypes, and the simulator's settings.
#include "cuda/launch.h"
#include "cuda_on_cpu.h"

using namespace s2ft;

extern "C" {

void configure(unsigned seed, unsigned max_blocks, int capturing) {
  simulator::machine().seed = seed;
  simulator::machine().max_blocks = max_blocks;
  simulator::machine().capturing = capturing != 0;
}

// The runtime calls since the last time.
const char* calls() {
  static std::string text;
  text = std::move(simulator::machine().calls);
  simulator::machine().calls.clear();
  return text.c_str();
}

const char* last_error() { return cuda::error_text(0); }

int units(const char* step, int weight_type, int delta_type, void* weight, const void* delta, void* dense,
          const int64_t* index, int64_t start, int64_t limit, int64_t outer, int64_t inner, int64_t outer_stride,
          int64_t inner_stride, int rows) {
  const Units u{index, start, limit, outer, inner, outer_stride, inner_stride, rows != 0};
  const UnitsData data{static_cast<DType>(weight_type), static_cast<DType>(delta_type), weight, delta, dense};
  const std::string which = step;
  if (which == "write") return cuda::write_units(u, data, nullptr);
  if (which == "sum") return cuda::sum_units(u, data, nullptr);
  if (which == "restore") return cuda::restore_units(u, data, nullptr);
  return -1;
}

int exchange(int64_t element_size, void* weight, void* values, const int64_t* index, int64_t limit,
             const int64_t* size, const int64_t* weight_stride, const int64_t* values_stride, int dim) {
  Exchange e{};
  e.index = index;
  e.limit = limit;
  e.dim = dim;
  for (int d = 0; d < 3; ++d) {
    e.size[d] = size[d];
    e.weight_stride[d] = weight_stride[d];
    e.values_stride[d] = values_stride[d];
  }
  return cuda::exchange_units(e, element_size, weight, values, nullptr);
}

int ordered_begin(int device, void* stream) { return cuda::ordered_begin(device, stream); }
int ordered_end(int device, void* stream) { return cuda::ordered_end(device, stream); }

}
