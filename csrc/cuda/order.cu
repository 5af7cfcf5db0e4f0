// Order between streams. An op writes to a weight and restores it within one stream. Two streams that run the same
// layer at the same time would see each other's sums in the weight. One event per device prevents this.
//
// A stream needs no event to run after its own work, so nothing waits if the last op was on the same stream. Streams are
// compared by their id, which CUDA never gives twice. A handle is used again when its stream was destroyed, although the
// work of that stream may still run, and the handle of a thread's default stream is the same number in every thread.
#include <vector>

#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

struct Last {
  cudaEvent_t event = nullptr;    // never destroyed
  unsigned long long stream = 0;  // id of the stream of the last op; valid if there is an event
  // Of the op between ordered_begin() and ordered_end():
  bool captured = false;
  unsigned long long current = 0;
};

// There is one entry per device. The caller holds weight_lock().
Last& last_on(int device) {
  static std::vector<Last>* all = new std::vector<Last>();
  if (static_cast<size_t>(device) >= all->size()) all->resize(device + 1);
  return (*all)[device];
}

}  // namespace

int ordered_begin(int device, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  Last& last = last_on(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(queue, &status)) return static_cast<int>(error);
  last.captured = status != cudaStreamCaptureStatusNone;
  if (last.captured) return 0;
  if (const cudaError_t error = cudaStreamGetId(queue, &last.current)) return static_cast<int>(error);
  if (!last.event || last.stream == last.current) return 0;
  return static_cast<int>(cudaStreamWaitEvent(queue, last.event, 0));
}

int ordered_end(int device, void* stream) {
  Last& last = last_on(device);
  if (last.captured) return 0;
  if (!last.event) {
    const cudaError_t error = cudaEventCreateWithFlags(&last.event, cudaEventDisableTiming);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  const cudaError_t error = cudaEventRecord(last.event, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) last.stream = last.current;
  return static_cast<int>(error);
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
int built_version() { return CUDART_VERSION; }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace s2ft::cuda
