// Order between streams. An op writes to a weight and restores it within one stream. Two streams that run the same
// layer at the same time would see each other's sums in the weight. One event per device prevents this.
#include <vector>

#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

struct Last {
  cudaEvent_t event = nullptr;  // never destroyed
};

// There is one entry per device. The caller holds weight_lock().
Last& last_on(int device) {
  static std::vector<Last>* all = new std::vector<Last>();
  if (static_cast<size_t>(device) >= all->size()) all->resize(device + 1);
  return (*all)[device];
}

int capturing(cudaStream_t stream, bool* result) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  *result = status != cudaStreamCaptureStatusNone;
  return static_cast<int>(error);
}

}  // namespace

int ordered_begin(int device, void* stream) {
  bool captured = false;
  if (const int error = capturing(static_cast<cudaStream_t>(stream), &captured)) return error;
  Last& last = last_on(device);
  if (captured || !last.event) return 0;
  return static_cast<int>(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), last.event, 0));
}

int ordered_end(int device, void* stream) {
  bool captured = false;
  if (const int error = capturing(static_cast<cudaStream_t>(stream), &captured)) return error;
  if (captured) return 0;
  Last& last = last_on(device);
  if (!last.event) {
    const cudaError_t error = cudaEventCreateWithFlags(&last.event, cudaEventDisableTiming);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  return static_cast<int>(cudaEventRecord(last.event, static_cast<cudaStream_t>(stream)));
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
int built_version() { return CUDART_VERSION; }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace s2ft::cuda
