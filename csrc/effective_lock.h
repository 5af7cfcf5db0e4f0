// One lock for all that writes to weights. While one thread has a weight in its effective state
// (linear.h) no other may read or change it. Two tensors can share memory, so one lock serves all
// weights of the process.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>

namespace s2ft {

// A mutex that its owner may lock again: s2ft.stable_weights() holds it around code that runs ops. Not
// std::recursive_mutex, which a forked child could not unlock: that one compares thread numbers of the kernel.
class WeightLock {
 public:
  void lock() {
    const std::thread::id me = std::this_thread::get_id();
    if (owner_.load(std::memory_order_relaxed) != me) {
      mutex_.lock();
      owner_.store(me, std::memory_order_relaxed);
    }
    ++depth_;
  }

  void unlock() {
    if (--depth_ > 0) return;
    owner_.store(std::thread::id(), std::memory_order_relaxed);
    mutex_.unlock();
  }

  bool held() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

 private:
  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{std::thread::id()};
  int depth_ = 0;  // read and written by the owner only
};

inline WeightLock& effective_lock() {
  static WeightLock lock;
  return lock;
}

// Runs f(), which changes a weight, when no other op holds one, on CUDA in order with other streams.
template <class Device, class F>
void in_turn(const Device& device, const F& f) {
  const std::lock_guard<WeightLock> lock(effective_lock());
  device.begin();
  f();
  device.end();
}

}  // namespace s2ft
