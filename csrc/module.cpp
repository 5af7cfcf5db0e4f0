// The Python module s2ft._C. Importing it registers the CPU kernels; those for CUDA are registered on request.
constexpr unsigned long long kTorchTarget = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION  // where it is defined, the pybind11 in PyTorch 2.11's headers refuses to be included
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#ifdef S2FT_WITH_CUDA
#include "cuda/launch.h"
#include "cuda/register.h"
#endif

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
  m.def("build_info", &build_info, "How this module was compiled.");
#ifdef S2FT_WITH_CUDA
  m.def("cuda_versions", [] { return std::pair(s2ft::cuda::driver_version(), s2ft::cuda::built_version()); },
        "The CUDA versions of the driver, 0 without one, and of the build: 1000 * major + 10 * minor.");
  m.def("register_cuda", &s2ft::register_cuda, "Register the CUDA kernels; once, however often it is called.");
#endif
}
