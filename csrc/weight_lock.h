// One lock for everything that writes to weights. While a thread has base + delta in a weight (linear.h), no other
// thread may read or change it. Two tensors can share memory, so there is one lock for all weights of the process.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>

namespace s2ft {

// A mutex that its owner may lock again: s2ft.stable_weights() holds it around code that runs ops. It is not
// std::recursive_mutex, which compares thread numbers of the kernel, so that a forked child could not unlock it.
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

  bool try_lock() {
    const std::thread::id me = std::this_thread::get_id();
    if (owner_.load(std::memory_order_relaxed) != me) {
      if (!mutex_.try_lock()) return false;
      owner_.store(me, std::memory_order_relaxed);
    }
    ++depth_;
    return true;
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
  int depth_ = 0;  // only the owner reads and writes it
};

inline WeightLock& weight_lock() {
  static WeightLock lock;
  return lock;
}

// Runs f(), which changes a weight, while no other op holds a weight. On CUDA it is also ordered with other streams.
template <class Device, class F>
void run_exclusively(const Device& device, const F& f) {
  const std::lock_guard<WeightLock> lock(weight_lock());
  device.begin();
  f();
  device.end();
}

}  // namespace s2ft
