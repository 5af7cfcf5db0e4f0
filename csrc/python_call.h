// Calls a Python function while base + delta is in a weight of the CPU: what linear.h does, for callers in Python.
//
// A call of a registered op takes the host 10 to 20 µs, because it looks up the op, packs its arguments, and makes the
// product through the dispatcher again. s2ft/ops/_linear.py uses this function where nothing has to see the op. Python
// can't run an interrupt between the write and the restore: no bytecode runs there, only `function`, which is in C.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>

#include "core/units.h"
#include "cpu/units.h"
#include "weight_lock.h"
#include "writable.h"

namespace s2ft {

// Other threads of Python run meanwhile.
template <class F>
void without_gil(const F& f) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    f();
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
}

// Waits without the GIL, so that the thread that holds the lock can go on.
inline void lock_weights() {
  if (!weight_lock().try_lock()) without_gil([] { weight_lock().lock(); });
}

// Below this number of elements, a write takes less than 20 µs, and other threads can wait for it.
constexpr int64_t kWithGil = int64_t{64} << 10;

// The numbers that Python passes, see call_on_effective in s2ft/ops/_effective.py. Its callers have checked that the
// tensors are on the CPU, that no two elements of the weight share memory, and that delta and index are dense.
struct EffectiveCall {
  static constexpr int kNumbers = 13;
  Units units{};
  UnitsData data{};

  // std::invalid_argument: the numbers don't fit together, or the weight can't be written.
  explicit EffectiveCall(const std::array<int64_t, kNumbers>& numbers) {
    const auto [weight, weight_type, outputs, inputs, output_stride, input_stride, delta, delta_type, outer, inner, dim,
                start, index] = numbers;
    constexpr const char* op = "call_on_effective";
    require(dim == 0 || dim == 1, op, "dim must be 0 (outputs) or 1 (inputs), got ", dim);
    const int64_t length = dim == 0 ? outer : inner;
    units.rows = dim == 0;
    units.limit = dim == 0 ? outputs : inputs;
    require((dim == 0 ? inner == inputs : outer == outputs), op, "delta does not fit the weight");
    units.index = reinterpret_cast<const int64_t*>(index);
    units.start = start;
    if (index)
      check_index_range(units.index, length, units.limit, op, "index");
    else
      require(start >= 0 && length <= units.limit && start <= units.limit - length, op, "slice outside the weight");
    units.outer = outer;
    units.inner = inner;
    units.outer_stride = output_stride;
    units.inner_stride = input_stride;
    data.weight = reinterpret_cast<void*>(weight);
    data.weight_type = static_cast<DType>(weight_type);
    data.delta = reinterpret_cast<const void*>(delta);
    data.delta_type = static_cast<DType>(delta_type);
    require(outputs * inputs == 0 || is_writable(data.weight), op, "the weight is in read-only memory");
  }

  PyObject* run(PyObject* function, PyObject* arguments) {
    const std::unique_ptr<char[]> base(new char[std::max<int64_t>(1, units.total() * size_of(data.weight_type))]);
    data.dense = base.get();
    lock_weights();
    const std::unique_lock<WeightLock> release(weight_lock(), std::adopt_lock);
    change([this] { Cpu{}.write(units, data); });
    PyObject* const result = PyObject_Call(function, arguments, nullptr);
    change([this] { Cpu{}.restore(units, data); });
    return result;
  }

 private:
  template <class F>
  void change(const F& f) const {
    if (units.total() < kWithGil)
      f();
    else
      without_gil(f);
  }
};

}  // namespace s2ft
