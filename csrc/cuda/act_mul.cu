// The kernels of act_mul. If all tensors are aligned, they read 16 bytes of every tensor at a time, and then the
// remaining elements one by one. Otherwise they read all elements one by one. 16-bit elements are computed in pairs, a
// single one with a zero beside it, so a result does not depend on its place. Rows of gate and up may have gaps between
// them; packs are read from such rows if each begins at a pack.
#include "../core/activation.h"
#include "fast_activation.h"
#include "launch.h"
#include "platform.h"

namespace s2ft::cuda {
namespace {

// What is computed at once: an element, or a pair of 16-bit elements.
template <class T>
struct Item {
  using type = T;
  __device__ static type load(const T* at) { return *at; }
  __device__ static void store(T* at, type item) { *at = item; }
};

template <class T>
struct PairItem {
  using type = Pair<T>;
  __device__ static type load(const T* at) { return pair_of(*at); }
  __device__ static void store(T* at, type item) { *at = first_of(item); }
};
template <>
struct Item<Half> : PairItem<Half> {};
template <>
struct Item<BFloat16> : PairItem<BFloat16> {};

template <class T>
using ItemOf = typename Item<T>::type;
template <class T>
using PackOf = Pack<ItemOf<T>, 16 / sizeof(ItemOf<T>)>;

template <class T>
constexpr int kWidth = 16 / sizeof(T);  // elements of a pack

// Rows of gate and up, in elements or in packs. A row has at least one.
struct Rows {
  int64_t columns, gate_row, up_row;
  __device__ int64_t gate(int64_t i) const { return in_rows(i, columns, gate_row); }
  __device__ int64_t up(int64_t i) const { return in_rows(i, columns, up_row); }
};

template <class Act, class T>
__global__ void act_mul_items(const T* gate, const T* up, T* out, Rows rows, Rows pack_rows, int64_t packs,
                              int64_t size) {
  using P = PackOf<T>;
  for (int64_t t = first_item(); t < packs; t += item_step()) {
    const P g = reinterpret_cast<const P*>(gate)[pack_rows.gate(t)],
            u = reinterpret_cast<const P*>(up)[pack_rows.up(t)];
    P result;
#pragma unroll
    for (size_t i = 0; i < sizeof(P) / sizeof(P::at[0]); ++i) result.at[i] = act_mul_of<Act>(g.at[i], u.at[i]);
    reinterpret_cast<P*>(out)[t] = result;
  }
  for (int64_t i = packs * kWidth<T> + first_item(); i < size; i += item_step())
    Item<T>::store(out + i, act_mul_of<Act>(Item<T>::load(gate + rows.gate(i)), Item<T>::load(up + rows.up(i))));
}

template <class Act, class T>
__global__ void act_mul_backward_items(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, Rows rows,
                                       Rows pack_rows, int64_t packs, int64_t size) {
  using P = PackOf<T>;
  for (int64_t t = first_item(); t < packs; t += item_step()) {
    const P d = reinterpret_cast<const P*>(grad)[t], g = reinterpret_cast<const P*>(gate)[pack_rows.gate(t)],
            u = reinterpret_cast<const P*>(up)[pack_rows.up(t)];
    P of_gate, of_up;
#pragma unroll
    for (size_t i = 0; i < sizeof(P) / sizeof(P::at[0]); ++i)
      act_mul_gradients<Act>(d.at[i], g.at[i], u.at[i], &of_gate.at[i], &of_up.at[i]);
    reinterpret_cast<P*>(grad_gate)[t] = of_gate;
    reinterpret_cast<P*>(grad_up)[t] = of_up;
  }
  for (int64_t i = packs * kWidth<T> + first_item(); i < size; i += item_step()) {
    ItemOf<T> of_gate, of_up;
    act_mul_gradients<Act>(Item<T>::load(grad + i), Item<T>::load(gate + rows.gate(i)), Item<T>::load(up + rows.up(i)),
                           &of_gate, &of_up);
    Item<T>::store(grad_gate + i, of_gate);
    Item<T>::store(grad_up + i, of_up);
  }
}

// How many packs the tensors have; none if one of them, or a row, does not begin at a pack.
template <class T, class... Pointers>
int64_t packs_of(const ActMulData& d, Pointers... pointers) {
  const bool one_row = d.columns == d.size;
  const bool at_packs = one_row || (d.columns | d.gate_row | d.up_row) % kWidth<T> == 0;
  return at_packs && (aligned16(pointers) && ...) ? d.size / kWidth<T> : 0;
}

Rows rows_of(const ActMulData& d) { return {d.columns, d.gate_row, d.up_row}; }

// The rows in packs. One row may end with elements that fill no pack.
template <class T>
Rows pack_rows_of(const ActMulData& d) {
  constexpr int64_t width = kWidth<T>;
  return {(d.columns + width - 1) / width, d.gate_row / width, d.up_row / width};
}

// The work items are the packs if there are any, otherwise the elements.
int blocks_of(int64_t packs, int64_t size) { return blocks_for(packs ? packs : size); }

template <class Act, class T>
void launch(const ActMulData& d, cudaStream_t stream) {
  const int64_t packs = packs_of<T>(d, d.gate, d.up, d.out);
  S2FT_LAUNCH((act_mul_items<Act, T>), blocks_of(packs, d.size), kThreads, stream, static_cast<const T*>(d.gate),
              static_cast<const T*>(d.up), static_cast<T*>(d.out), rows_of(d), pack_rows_of<T>(d), packs, d.size);
}

template <class Act, class T>
void launch_backward(const ActMulData& d, cudaStream_t stream) {
  const int64_t packs = packs_of<T>(d, d.grad, d.gate, d.up, d.grad_gate, d.grad_up);
  S2FT_LAUNCH((act_mul_backward_items<Act, T>), blocks_of(packs, d.size), kThreads, stream,
              static_cast<const T*>(d.grad), static_cast<const T*>(d.gate), static_cast<const T*>(d.up),
              static_cast<T*>(d.grad_gate), static_cast<T*>(d.grad_up), rows_of(d), pack_rows_of<T>(d), packs, d.size);
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
