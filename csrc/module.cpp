// The Python module s2ft._C. Its import registers the CPU kernels. register_cuda() registers the CUDA kernels.
constexpr unsigned long long kTorchTarget = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION  // the pybind11 in PyTorch 2.11's headers can't be included while it is defined
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef S2FT_WITH_CUDA
#include "cuda/launch.h"
#include "cuda/register.h"
#endif

#include "weight_lock.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

std::string torch_target() {
  return std::to_string(kTorchTarget >> 56) + "." + std::to_string((kTorchTarget >> 48) & 0xff);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch_target"] = torch_target();
#ifdef S2FT_WITH_CUDA
  info["with_cuda"] = true;
  info["cuda_archs"] = S2FT_CUDA_ARCHS;
#else
  info["with_cuda"] = false;
  info["cuda_archs"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of s2ft.";
  // A context manager in C++. No Python signal handler can run between the moment the lock is taken and the moment the
  // context manager is responsible for it.
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<s2ft::WeightLock, std::unique_ptr<s2ft::WeightLock, pybind11::nodelete>>(m, "WeightLock")
      .def("acquire", &s2ft::WeightLock::lock, NoGil())
      .def("release",
           [](s2ft::WeightLock& lock) {
             if (!lock.held()) throw std::runtime_error("this thread does not hold the lock of the weights");
             lock.unlock();
           })
      .def("__enter__", &s2ft::WeightLock::lock, NoGil())
      .def("__exit__", [](s2ft::WeightLock& lock, const pybind11::args&) { lock.unlock(); });
  m.attr("weight_lock") = pybind11::cast(&s2ft::weight_lock(), pybind11::return_value_policy::reference);
  m.def("build_info", &build_info, "How this module was compiled.");
#ifdef S2FT_WITH_CUDA
  m.def(
      "cuda_versions", [] { return std::pair(s2ft::cuda::driver_version(), s2ft::cuda::built_version()); },
      "The CUDA versions of the driver (0 without a driver) and of the build, as 1000 * major + 10 * minor.");
  m.def("register_cuda", &s2ft::register_cuda, "Register the CUDA kernels. Further calls do nothing.");
#endif
}
