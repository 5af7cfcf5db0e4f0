// The Python module s2ft._C. Its import registers the CPU kernels. register_cuda() registers the CUDA kernels.
//
// It uses Python's limited API only, so one build serves Python 3.10 and every later version.
#ifdef Py_LIMITED_API  // not with free-threaded Python, which has no limited API
#undef Py_LIMITED_API  // PyTorch defines it for the oldest Python that PyTorch itself supports
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <string>

#ifdef S2FT_WITH_CUDA
#include "cuda/launch.h"
#include "cuda/register.h"
#endif

namespace {

// --- how this module was compiled --------------------------------------------------------------------

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
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  return std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
}

#ifdef S2FT_WITH_CUDA
constexpr bool kWithCuda = true;
constexpr const char* kCudaArchs = S2FT_CUDA_ARCHS;
#else
constexpr bool kWithCuda = false;
constexpr const char* kCudaArchs = "";
#endif

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:l,s:s,s:O,s:s}", "compiler", compiler().c_str(), "cxx_standard",
                       static_cast<long>(__cplusplus), "torch_target", torch_target().c_str(), "with_cuda",
                       kWithCuda ? Py_True : Py_False, "cuda_archs", kCudaArchs);
}

#ifdef S2FT_WITH_CUDA
PyObject* cuda_versions(PyObject*, PyObject*) {
  return Py_BuildValue("(ii)", s2ft::cuda::driver_version(), s2ft::cuda::built_version());
}

PyObject* register_cuda(PyObject*, PyObject*) {
  try {
    s2ft::register_cuda();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}
#endif

// --- the module --------------------------------------------------------------------------------------

PyMethodDef functions[] = {
    {"build_info", &build_info, METH_NOARGS, "How this module was compiled, as a dict."},
#ifdef S2FT_WITH_CUDA
    {"cuda_versions", &cuda_versions, METH_NOARGS,
     "The CUDA versions of the driver (0 without a driver) and of the build, as 1000 * major + 10 * minor."},
    {"register_cuda", &register_cuda, METH_NOARGS, "Register the CUDA kernels. Further calls do nothing."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "s2ft._C", "Compiled kernels of s2ft.", 0, functions, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
