// Replaces the CUDA runtime, so that the .cu files of csrc/cuda run on the CPU. For tests only.
//
// Every CUDA thread is a fiber. The blocks of a grid run one after another. Within a block the fibers run in random
// order, which changes after every barrier. A kernel that depends on an order, or lacks a barrier, gives wrong numbers
// for some seed. It is an error if only a part of a block reaches a block barrier, or a part of a warp reaches a warp
// exchange.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// --- runtime calls ----------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

namespace simulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{64} << 10;

enum class At { running, block_barrier, warp_barrier, finished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread;
  At at = At::running;
};

struct Machine {
  unsigned seed = 0;
  unsigned max_blocks = 0;  // 0 for no limit. With fewer blocks a grid-stride loop makes more iterations.
  double exp2_error = 0, reciprocal_error = 0;  // relative errors of the approximate instructions
  std::string error;                            // of the last launch

  dim3 grid, block, block_index;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::vector<uint64_t> lanes;                    // values that lanes publish in a warp exchange
  std::vector<std::array<uint32_t, 6>> held;      // fragments that lanes publish for a product of matrices
  std::map<int, std::unique_ptr<char[]>> shared;  // by declaration
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void wait_at(At place) {
  Machine& m = machine();
  Fiber* me = m.current;
  me->at = place;
  swapcontext(&me->context, &m.scheduler);
}

inline void fiber_main() {
  machine().kernel();
  wait_at(At::finished);
}

// A function of its own, because the compiler must assume that getcontext returns twice.
inline void prepare_context(Fiber& f) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
}

inline void start_fibers(Machine& m) {
  unsigned n = 0;
  for (Fiber& f : m.fibers) {
    f.thread = dim3(n % m.block.x, n / m.block.x % m.block.y, n / (m.block.x * m.block.y));
    f.at = At::running;
    prepare_context(f);
    ++n;
  }
}

inline void run_runnable(Machine& m, std::vector<size_t>& order, std::mt19937& random) {
  std::shuffle(order.begin(), order.end(), random);
  for (size_t i : order) {
    if (m.fibers[i].at != At::running) continue;
    m.current = &m.fibers[i];
    swapcontext(&m.scheduler, &m.current->context);
  }
}

// Releases the fibers [begin, end) from the barrier `place` if all of them that have not finished wait there.
inline bool release(Machine& m, size_t begin, size_t end, At place, bool all_must_live) {
  size_t waiting = 0, finished = 0;
  for (size_t i = begin; i < end; ++i) {
    waiting += m.fibers[i].at == place;
    finished += m.fibers[i].at == At::finished;
  }
  if (waiting == 0 || waiting + finished != end - begin) return false;
  if (all_must_live && finished) {
    m.error = "a block barrier was reached by part of the block only";
    return false;
  }
  for (size_t i = begin; i < end; ++i)
    if (m.fibers[i].at == place) m.fibers[i].at = At::running;
  return true;
}

inline bool all_finished(const Machine& m) {
  return std::all_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& f) { return f.at == At::finished; });
}

inline void run_block(Machine& m, std::mt19937& random) {
  const size_t n = m.fibers.size();
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = i;
  m.shared.clear();
  start_fibers(m);
  while (m.error.empty()) {
    run_runnable(m, order, random);
    if (all_finished(m)) return;
    bool progress = false;
    for (size_t w = 0; w < n; w += kWarp) progress |= release(m, w, std::min(n, w + kWarp), At::warp_barrier, false);
    progress |= release(m, 0, n, At::block_barrier, true);
    if (!progress && m.error.empty()) m.error = "threads wait at different barriers";
  }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
  Machine& m = machine();
  if (m.max_blocks) grid.x = std::min(grid.x, m.max_blocks);
  m.grid = grid;
  m.block = block;
  m.kernel = std::move(kernel);
  m.error.clear();
  m.fibers.resize(size_t{block.x} * block.y * block.z);
  m.lanes.assign(m.fibers.size(), 0);
  std::mt19937 random(m.seed);
  std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<unsigned>(i);
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (unsigned b : blocks) {
    m.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    run_block(m, random);
    if (!m.error.empty()) return;
  }
}

// There is one allocation per block and declaration, so that an address sanitizer finds overruns. It is filled with
// ones, which are a NaN, so that a read before the first write is noticed.
template <class T>
T* shared(int declaration, size_t count) {
  std::unique_ptr<char[]>& memory = machine().shared[declaration];
  if (!memory) {
    memory.reset(new char[count * sizeof(T)]);
    std::memset(memory.get(), 0xff, count * sizeof(T));
  }
  return reinterpret_cast<T*>(memory.get());
}

// Every lane publishes a value and reads the value of lane `from` of its warp, or its own if there is no such lane.
template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Machine& m = machine();
  const size_t me = static_cast<size_t>(m.current - m.fibers.data());
  const size_t other = me / kWarp * kWarp + static_cast<size_t>(from);
  std::memcpy(&m.lanes[me], &value, sizeof(T));
  wait_at(At::warp_barrier);
  T result = value;
  if (from >= 0 && from < kWarp && other < m.lanes.size()) std::memcpy(&result, &m.lanes[other], sizeof(T));
  wait_at(At::warp_barrier);
  return result;
}

// The product of two matrices in the fragments of csrc/cuda/matrix.h. The lanes publish what they hold.
template <class Pair>
void add_product(float* sum, const Pair* left, const Pair* right) {
  struct Held {
    Pair left[4], right[2];
  };
  Machine& m = machine();
  const size_t me = static_cast<size_t>(m.current - m.fibers.data()), first = me / kWarp * kWarp, lane = me - first;
  m.held.resize(m.fibers.size());
  Held mine;
  std::copy_n(left, 4, mine.left);
  std::copy_n(right, 2, mine.right);
  static_assert(sizeof(Held) == sizeof(m.held[0]));
  std::memcpy(&m.held[me], &mine, sizeof(Held));
  wait_at(At::warp_barrier);
  const auto held = [&](size_t other) {
    Held value;
    std::memcpy(&value, &m.held[first + other], sizeof(Held));
    return value;
  };
  for (size_t k = 0; k < 16; ++k)
    for (size_t c = 0; c < 4; ++c) {
      const Pair a = held(lane / 4 * 4 + k % 8 / 2).left[c / 2 + k / 8 * 2];
      const Pair b = held((lane % 4 * 2 + c % 2) * 4 + k % 8 / 2).right[k / 8];
      const auto x = widen(a), y = widen(b);
      sum[c] += k % 2 ? x.second * y.second : x.first * y.first;
    }
  wait_at(At::warp_barrier);
}

inline int lane() {
  const Machine& m = machine();
  return static_cast<int>((m.current - m.fibers.data()) % kWarp);
}

inline float without_subnormals(double value) {
  const float f = static_cast<float>(value);
  return std::fabs(f) < 0x1p-126f ? std::copysign(0.0f, f) : f;
}

// The approximate instructions of a GPU that make every subnormal number a zero.
inline float approximate_exp2(float x) {
  return without_subnormals(std::exp2(static_cast<double>(without_subnormals(x))) * (1 + machine().exp2_error));
}
inline float approximate_reciprocal(float x) {
  return without_subnormals(1 / static_cast<double>(without_subnormals(x)) * (1 + machine().reciprocal_error));
}

}  // namespace simulator

#define threadIdx (simulator::machine().current->thread)
#define blockIdx (simulator::machine().block_index)
#define blockDim (simulator::machine().block)
#define gridDim (simulator::machine().grid)
#define S2FT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), simulator::launch(dim3(grid), dim3(block), [=] { kernel(__VA_ARGS__); }))
#define S2FT_SHARED(T, name, count) T* name = simulator::shared<T>(__COUNTER__, count)

inline void __syncthreads() { simulator::wait_at(simulator::At::block_barrier); }
inline void __syncwarp(unsigned = ~0u) { simulator::wait_at(simulator::At::warp_barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simulator::exchange(value, simulator::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return simulator::exchange(value, lane % simulator::kWarp);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return simulator::exchange(value, simulator::lane() + offset);
}

inline cudaError_t cudaGetLastError() {
  return simulator::machine().error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t) { return simulator::machine().error.c_str(); }
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
