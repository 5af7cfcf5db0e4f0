// The kernels of csrc/cuda as plain functions: raw pointers and the stream as void*, no CUDA and no
// PyTorch headers. Each enqueues and returns a cudaError_t as int, 0 for success. A unit outside the
// matrix is skipped: looking for one beforehand would make the host wait, so the layers check their
// indices once, when they are made.
#pragma once

#include <cstdint>

#include "../core/activation.h"
#include "../core/bank.h"
#include "../core/exchange.h"
#include "../core/scatter.h"
#include "../core/units.h"

namespace s2ft::cuda {

// dense := base, weight := base + delta. With an index, all of dense is taken before the weight is
// written, so a unit named twice is restored exactly; which of its sums the weight holds is open.
int write_units(const Units& units, const UnitsData& data, void* stream);
// dense := base + delta; the weight is only read.
int sum_units(const Units& units, const UnitsData& data, void* stream);
// weight := dense.
int restore_units(const Units& units, const UnitsData& data, void* stream);

// Puts the units of `weight` in a new order, by way of a scratch buffer of permute_scratch_bytes().
int64_t permute_scratch_bytes(const Along& weight, int64_t element_size);
int permute_units(const Along& along, const int64_t* order, int64_t element_size, void* weight, void* scratch,
                  int64_t scratch_bytes, void* stream);

// weight += alpha * delta for every part, however many; `scratch` has scatter_scratch_bytes(), aligned to 8.
int64_t scatter_scratch_bytes(const Scatter& scatter);
int scatter_add_units(const Scatter& scatter, void* scratch, void* stream);

// Exchanges the elements of `weight` that `exchange` names with `values`.
int exchange_units(const Exchange& exchange, int64_t element_size, void* weight, void* values, void* stream);

// out := y plus what each sequence's adapter adds.
int add_adapters(const Bank& bank, const Batch& batch, DType dtype, void* stream);

// out := act(gate) * up, and its gradients; `data` names the tensors.
int act_mul(Activation activation, const ActMulData& data, void* stream);
int act_mul_backward(Activation activation, const ActMulData& data, void* stream);

// Orders `stream` after everything that ordered_end() has covered on this device, whatever its stream;
// then marks what `stream` holds now. Both under effective_lock(). During graph capture they do
// nothing: a captured graph cannot wait for work outside it, so order its replays yourself.
int ordered_begin(int device, void* stream);
int ordered_end(int device, void* stream);

// CUDA versions, 1000 * major + 10 * minor: what the driver serves, 0 without a driver; what this was built with.
int driver_version();
int built_version();

const char* error_text(int error);

}  // namespace s2ft::cuda
