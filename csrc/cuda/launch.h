// The kernels of csrc/cuda as plain functions with raw pointers and the stream as void*, without CUDA and PyTorch
// headers. Each function enqueues its work and returns a cudaError_t as int, 0 for success. A unit outside the matrix
// is skipped. A check beforehand would make the host wait, so the layers check their indices once, when they are made.
#pragma once

#include <cstdint>

#include "../core/activation.h"
#include "../core/bank.h"
#include "../core/exchange.h"
#include "../core/scatter.h"
#include "../core/units.h"

namespace s2ft::cuda {

// weight = base + delta for any number of slices.
int write_slices(const Slice* slices, int64_t count, void* stream);

// Reorders the units of `weight`. The scratch buffer has permute_scratch_bytes().
int64_t permute_scratch_bytes(const Along& weight, int64_t element_size);
int permute_units(const Along& along, const int64_t* order, int64_t element_size, void* weight, void* scratch,
                  int64_t scratch_bytes, void* stream);

// weight += alpha * delta for any number of parts. `scratch` has scatter_scratch_bytes() and is aligned to 8 bytes.
int64_t scatter_scratch_bytes(const Scatter& scatter);
int scatter_add_units(const Scatter& scatter, void* scratch, void* stream);

// Exchanges the units of `weight` that `exchange` names with `values`.
int exchange_units(const Exchange& exchange, int64_t element_size, void* weight, void* values, void* stream);

// out = y + the product with the delta of each sequence's adapter.
int add_adapters(const Bank& bank, const Batch& batch, DType dtype, void* stream);

// out = act(gate) * up, and its gradients. `data` names the tensors.
int act_mul(Activation activation, const ActMulData& data, void* stream);
int act_mul_backward(Activation activation, const ActMulData& data, void* stream);

// CUDA versions of the driver (0 without a driver) and of the build, as 1000 * major + 10 * minor.
int driver_version();
int built_version();

const char* error_text(int error);

}  // namespace s2ft::cuda
