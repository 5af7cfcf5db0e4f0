// Registers the ops for CUDA. It combines their bodies in csrc/ with the kernels of launch.h. It uses no CUDA header
// and no CUDA library of PyTorch, so that it can be built and loaded with a CPU-only PyTorch too.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "../act_mul.h"
#include "../linear.h"
#include "../multi_adapter_linear.h"
#include "../permute.h"
#include "../scatter_add.h"
#include "../swap.h"
#include "../write_slices.h"
#include "launch.h"
#include "register.h"

namespace s2ft {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// The stable ABI has a function for native streams from PyTorch 2.13 on. Before, the function exists in libtorch_cuda
// only, which this module does not link. This finds it in the library that PyTorch has loaded.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetStream>(symbol);
}

void* current_stream(int32_t device) {
  static const GetStream get = find_get_stream();
  if (!get) throw std::runtime_error("s2ft: this PyTorch has no CUDA library to ask for the current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

void check(int error) {
  if (error) throw std::runtime_error(std::string("s2ft: CUDA error: ") + cuda::error_text(error));
}

class Cuda {
 public:
  explicit Cuda(const Tensor& t) : device_(t.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  void write(const Slice* slices, int64_t count) const { check(cuda::write_slices(slices, count, stream_)); }

  void permute(const Along& a, const int64_t* order, int64_t element_size, const Tensor& weight) const {
    const int64_t bytes = cuda::permute_scratch_bytes(a, element_size);
    const Tensor scratch = torch::stable::new_empty(weight, {bytes}, ScalarType::Byte);
    check(cuda::permute_units(a, order, element_size, weight.mutable_data_ptr(), scratch.mutable_data_ptr(), bytes,
                              stream_));
  }

  void scatter_add(const Scatter& s, const Tensor& weight) const {
    const Tensor scratch = torch::stable::new_empty(weight, {cuda::scatter_scratch_bytes(s)}, ScalarType::Byte);
    check(cuda::scatter_add_units(s, scratch.mutable_data_ptr(), stream_));
  }

  void exchange(const Exchange& e, int64_t element_size, void* weight, void* values) const {
    check(cuda::exchange_units(e, element_size, weight, values, stream_));
  }

  void add(const Bank& bank, const Batch& batch, DType dtype, const Tensor&, const Tensor&) const {
    check(cuda::add_adapters(bank, batch, dtype, stream_));
  }

  static bool computes(Activation, DType) { return true; }
  void act_mul(Activation act, const ActMulData& data) const { check(cuda::act_mul(act, data, stream_)); }
  void act_mul_backward(Activation act, const ActMulData& data) const {
    check(cuda::act_mul_backward(act, data, stream_));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

void add_kernels(StableLibrary& library) {
  library.impl("write_slices_", TORCH_BOX(&write_slices<Cuda>));
  library.impl("sliced_linear", TORCH_BOX(&sliced_linear<Cuda>));
  library.impl("sliced_linear_grad_x", TORCH_BOX(&sliced_linear_grad_x<Cuda>));
  library.impl("indexed_linear", TORCH_BOX(&indexed_linear<Cuda>));
  library.impl("indexed_linear_grad_x", TORCH_BOX(&indexed_linear_grad_x<Cuda>));
  library.impl("act_mul", TORCH_BOX(&act_mul<Cuda>));
  library.impl("act_mul_backward", TORCH_BOX(&act_mul_backward<Cuda>));
  library.impl("multi_adapter_linear", TORCH_BOX(&multi_adapter_linear<Cuda>));
  library.impl("permute_", TORCH_BOX(&permute<Cuda>));
  library.impl("scatter_add_", TORCH_BOX(&scatter_add<Cuda>));
  library.impl("swap_", TORCH_BOX(&swap<Cuda>));
}

}  // namespace

void register_cuda() {
  static const StableTorchLibraryInit once(StableLibrary::Kind::IMPL, &add_kernels, "s2ft", "CUDA", __FILE__, __LINE__);
}

}  // namespace s2ft
