// A C interface for ctypes to the launchers of csrc/cuda and to the simulator's settings.
#include "cuda/launch.h"
#include "cuda_on_cpu.h"

#include <tuple>
#include <vector>

using namespace s2ft;

// A tensor along one dimension, in the format of tests/cuda_on_cpu/conftest.py: units, outer, inner, their strides, and
// 1 if the units are the last dimension.
static Along along(const int64_t* a) { return Along{a[0], a[1], a[2], a[3], a[4], a[5], a[6] != 0}; }

extern "C" {

void configure(unsigned seed, unsigned max_blocks) {
  simulator::machine().seed = seed;
  simulator::machine().max_blocks = max_blocks;
}

// Relative errors of the approximate exponential and reciprocal.
void approximate(double exp2_error, double reciprocal_error) {
  simulator::machine().exp2_error = exp2_error;
  simulator::machine().reciprocal_error = reciprocal_error;
}

const char* last_error() { return cuda::error_text(0); }

// Nine numbers of each slice: start, limit, outer, inner, their strides, 1 if the units are rows, and two dtypes.
int write_slices(int64_t count, const int64_t* numbers, void* const* weights, const void* const* bases,
                 const void* const* deltas, const int64_t* const* indices) {
  std::vector<Slice> slices;
  for (int64_t j = 0; j < count; ++j, numbers += 9) {
    const Units u{indices[j], numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6] != 0};
    slices.push_back(
        {u, static_cast<DType>(numbers[7]), static_cast<DType>(numbers[8]), weights[j], bases[j], deltas[j]});
  }
  return cuda::write_slices(slices.data(), count, nullptr);
}

int exchange(int64_t element_size, void* weight, const int64_t* weight_along, void* values, const int64_t* values_along,
             const int64_t* index) {
  const Exchange e{along(weight_along), along(values_along), index};
  return cuda::exchange_units(e, element_size, weight, values, nullptr);
}

int64_t permute_scratch_bytes(int64_t element_size, const int64_t* weight_along) {
  return cuda::permute_scratch_bytes(along(weight_along), element_size);
}

int permute(int64_t element_size, void* weight, const int64_t* weight_along, const int64_t* order, void* scratch,
            int64_t scratch_bytes) {
  return cuda::permute_units(along(weight_along), order, element_size, weight, scratch, scratch_bytes, nullptr);
}

int scatter_add(int weight_type, int delta_type, void* weight, const int64_t* weight_along, int64_t count,
                const void* const* deltas, const int64_t* delta_alongs, const int64_t* const* indices,
                const double* alphas, void* const* replaced, const int64_t* replaced_alongs) {
  std::vector<Part> parts;
  for (int64_t j = 0; j < count; ++j)
    parts.push_back({along(delta_alongs + 7 * j), replaced ? along(replaced_alongs + 7 * j) : Along{}, deltas[j],
                     replaced ? replaced[j] : nullptr, indices[j], alphas[j]});
  const Scatter s{
      along(weight_along), weight, static_cast<DType>(weight_type), static_cast<DType>(delta_type), parts.data(), count,
      replaced != nullptr};
  std::vector<int64_t> scratch(cuda::scatter_scratch_bytes(s) / 8, -7);  // like uninitialized memory
  return cuda::scatter_add_units(s, scratch.data(), nullptr);
}

// rows: elements of a row, and from the start of a row of gate and of up to that of the next
int act_mul(int activation, int dtype, int64_t size, const int64_t* rows, const void* gate, const void* up, void* out) {
  ActMulData d{};
  std::tie(d.columns, d.gate_row, d.up_row) = std::tie(rows[0], rows[1], rows[2]);
  d.dtype = static_cast<DType>(dtype);
  d.size = size;
  d.gate = gate;
  d.up = up;
  d.out = out;
  return cuda::act_mul(static_cast<Activation>(activation), d, nullptr);
}

int act_mul_backward(int activation, int dtype, int64_t size, const int64_t* rows, const void* grad, const void* gate,
                     const void* up, void* grad_gate, void* grad_up) {
  ActMulData d{};
  std::tie(d.columns, d.gate_row, d.up_row) = std::tie(rows[0], rows[1], rows[2]);
  d.dtype = static_cast<DType>(dtype);
  d.size = size;
  d.grad = grad;
  d.gate = gate;
  d.up = up;
  d.grad_gate = grad_gate;
  d.grad_up = grad_up;
  return cuda::act_mul_backward(static_cast<Activation>(activation), d, nullptr);
}

int add_adapters(int dtype, const void* x, const void* y, void* out, const int64_t* batch_sizes, const void* values,
                 const int64_t* index, const int64_t* offsets, const int64_t* adapter, const int64_t* bank_sizes,
                 int dim) {
  const Bank bank{values, index, offsets, bank_sizes[0], bank_sizes[1], bank_sizes[2], dim == 0};
  const Batch batch{x, y, out, adapter, batch_sizes[0], batch_sizes[1], batch_sizes[2], batch_sizes[3]};
  return cuda::add_adapters(bank, batch, static_cast<DType>(dtype), nullptr);
}
}
