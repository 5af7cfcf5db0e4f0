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

#include "python_call.h"
#include "weight_lock.h"

namespace {

// Runs f() and returns None, or raises RuntimeError with the text of a C++ exception.
template <class F>
PyObject* run(const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// --- the lock of the weights -------------------------------------------------------------------------

// Waits without the GIL, so that the thread that holds the lock can go on.
PyObject* acquire(PyObject*, PyObject*) {
  return run([] {
    PyThreadState* const state = PyEval_SaveThread();
    try {
      s2ft::weight_lock().lock();
    } catch (...) {
      PyEval_RestoreThread(state);
      throw;
    }
    PyEval_RestoreThread(state);
  });
}

PyObject* release(PyObject*, PyObject*) {
  if (!s2ft::weight_lock().held()) {
    PyErr_SetString(PyExc_RuntimeError, "this thread does not hold the lock of the weights");
    return nullptr;
  }
  s2ft::weight_lock().unlock();
  Py_RETURN_NONE;
}

// The context manager is in C, so that no interrupt leaves the lock taken. Up to Python 3.13 no signal handler can run
// between the return of this function and the start of the block that gives the lock back. Python 3.14 handles signals in
// between. So those that arrived during the wait for the lock are handled here.
PyObject* enter(PyObject*, PyObject*) {
  PyObject* const none = acquire(nullptr, nullptr);
  if (none && PyErr_CheckSignals() < 0) {
    Py_DECREF(none);
    s2ft::weight_lock().unlock();
    return nullptr;
  }
  return none;
}

PyMethodDef lock_methods[] = {
    {"acquire", &acquire, METH_NOARGS, "Take the lock. The thread that has it may take it again."},
    {"release", &release, METH_NOARGS, "Give the lock back. RuntimeError: this thread does not have it."},
    {"__enter__", &enter, METH_NOARGS, nullptr},
    {"__exit__", &release, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot lock_slots[] = {
    {Py_tp_doc, const_cast<char*>("The lock that an op holds while it changes a weight. There is one per process.")},
    {Py_tp_methods, lock_methods},
    {0, nullptr},
};

PyType_Spec lock_spec = {
    "s2ft._C.WeightLock", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, lock_slots,
};

// --- products ----------------------------------------------------------------------------------------

// Arguments: a function, a tuple of its arguments, and the numbers of EffectiveCall.
PyObject* call_on_effective(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  using s2ft::EffectiveCall;
  std::array<int64_t, EffectiveCall::kNumbers> numbers;
  if (count != 2 + EffectiveCall::kNumbers || !PyTuple_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "call_on_effective: wrong arguments");
    return nullptr;
  }
  for (int k = 0; k < EffectiveCall::kNumbers; ++k) {
    numbers[k] = PyLong_AsLongLong(arguments[2 + k]);
    if (numbers[k] == -1 && PyErr_Occurred()) return nullptr;
  }
  try {
    return EffectiveCall(numbers).run(arguments[0], arguments[1]);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

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
  return run([] { s2ft::register_cuda(); });
}
#endif

// --- the module --------------------------------------------------------------------------------------

PyMethodDef functions[] = {
    {"build_info", &build_info, METH_NOARGS, "How this module was compiled, as a dict."},
    {"call_on_effective", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_on_effective)), METH_FASTCALL,
     "Call a function while base + delta is in a weight."},
#ifdef S2FT_WITH_CUDA
    {"cuda_versions", &cuda_versions, METH_NOARGS,
     "The CUDA versions of the driver (0 without a driver) and of the build, as 1000 * major + 10 * minor."},
    {"register_cuda", &register_cuda, METH_NOARGS, "Register the CUDA kernels. Further calls do nothing."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

// Adds `object` to the module and gives the reference away. Returns 0, or -1 with an exception set.
int add(PyObject* module, const char* name, PyObject* object) {
  if (!object) return -1;
  const int status = PyModule_AddObjectRef(module, name, object);
  Py_DECREF(object);
  return status;
}

int fill(PyObject* module) {
  PyObject* const type = PyType_FromSpec(&lock_spec);
  if (!type) return -1;
  PyObject* const lock = PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type), 0);
  if (add(module, "weight_lock", lock) < 0) {
    Py_DECREF(type);
    return -1;
  }
  return add(module, "WeightLock", type);
}

PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(&fill)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "s2ft._C",
    "Compiled kernels of s2ft.",
    0,
    functions,
    module_slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
