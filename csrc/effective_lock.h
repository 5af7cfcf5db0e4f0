// One lock for all that writes to weights. While one thread has a weight in its effective state
// (linear.h) no other may read or change it. Two tensors can share memory, so one lock serves all
// weights of the process.
#pragma once

#include <mutex>

namespace s2ft {

inline std::mutex& effective_lock() {
  static std::mutex lock;
  return lock;
}

// Runs f(), which changes a weight, when no other op holds one, on CUDA in order with other streams.
template <class Device, class F>
void in_turn(const Device& device, const F& f) {
  const std::lock_guard<std::mutex> lock(effective_lock());
  device.begin();
  f();
  device.end();
}

}  // namespace s2ft
