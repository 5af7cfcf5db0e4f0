// The kernels of act_mul. If all tensors are aligned, they read 16 bytes of every tensor at a time, and then the
// remaining elements one by one. Otherwise they read all elements one by one.
#include "../core/activation.h"
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

template <class T>
constexpr int kWidth = 16 / sizeof(T);

template <class Act, class T>
__global__ void act_mul_items(const T* gate, const T* up, T* out, int64_t packs, int64_t size) {
  using P = Pack<T, kWidth<T>>;
  for (int64_t t = first_item(); t < packs; t += item_step()) {
    const P g = reinterpret_cast<const P*>(gate)[t], u = reinterpret_cast<const P*>(up)[t];
    P result;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) result.at[i] = act_mul_of<Act>(g.at[i], u.at[i]);
    reinterpret_cast<P*>(out)[t] = result;
  }
  for (int64_t i = packs * kWidth<T> + first_item(); i < size; i += item_step())
    out[i] = act_mul_of<Act>(gate[i], up[i]);
}

template <class Act, class T>
__global__ void act_mul_backward_items(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up,
                                       int64_t packs, int64_t size) {
  using P = Pack<T, kWidth<T>>;
  for (int64_t t = first_item(); t < packs; t += item_step()) {
    const P d = reinterpret_cast<const P*>(grad)[t], g = reinterpret_cast<const P*>(gate)[t],
            u = reinterpret_cast<const P*>(up)[t];
    P of_gate, of_up;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) act_mul_gradients<Act>(d.at[i], g.at[i], u.at[i], &of_gate.at[i], &of_up.at[i]);
    reinterpret_cast<P*>(grad_gate)[t] = of_gate;
    reinterpret_cast<P*>(grad_up)[t] = of_up;
  }
  for (int64_t i = packs * kWidth<T> + first_item(); i < size; i += item_step())
    act_mul_gradients<Act>(grad[i], gate[i], up[i], grad_gate + i, grad_up + i);
}

template <class T, class... Pointers>
int64_t packs_of(int64_t size, Pointers... pointers) {
  return (aligned16(pointers) && ...) ? size / kWidth<T> : 0;
}

// The work items are the packs if there are any, otherwise the elements.
int blocks_of(int64_t packs, int64_t size) { return blocks_for(packs ? packs : size); }

template <class Act, class T>
void launch(const ActMulData& d, cudaStream_t stream) {
  const int64_t packs = packs_of<T>(d.size, d.gate, d.up, d.out);
  S2FT_LAUNCH((act_mul_items<Act, T>), blocks_of(packs, d.size), kThreads, stream, static_cast<const T*>(d.gate),
              static_cast<const T*>(d.up), static_cast<T*>(d.out), packs, d.size);
}

template <class Act, class T>
void launch_backward(const ActMulData& d, cudaStream_t stream) {
  const int64_t packs = packs_of<T>(d.size, d.grad, d.gate, d.up, d.grad_gate, d.grad_up);
  S2FT_LAUNCH((act_mul_backward_items<Act, T>), blocks_of(packs, d.size), kThreads, stream,
              static_cast<const T*>(d.grad), static_cast<const T*>(d.gate), static_cast<const T*>(d.up),
              static_cast<T*>(d.grad_gate), static_cast<T*>(d.grad_up), packs, d.size);
}

}  // namespace

int act_mul(Activation activation, const ActMulData& data, void* stream) {
  if (data.size == 0) return 0;
  visit(activation, [&](auto act) {
    visit(data.dtype, [&](auto tag) {
      launch<decltype(act), typename decltype(tag)::type>(data, static_cast<cudaStream_t>(stream));
    });
  });
  return static_cast<int>(cudaGetLastError());
}

int act_mul_backward(Activation activation, const ActMulData& data, void* stream) {
  if (data.size == 0) return 0;
  visit(activation, [&](auto act) {
    visit(data.dtype, [&](auto tag) {
      launch_backward<decltype(act), typename decltype(tag)::type>(data, static_cast<cudaStream_t>(stream));
    });
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace s2ft::cuda
