// Sequences are grouped by adapter, so that each adapter is read once per group. In a batch over many adapters, reading
// them costs more than the arithmetic. Small groups use the kernels below, and large ones PyTorch's matrix product.
#include "../multi_adapter_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "lanes.h"
#include "parallel.h"
#include "spans.h"

namespace s2ft {
namespace {

constexpr int kTokens = 4;        // tokens that share a read of the adapter
constexpr int64_t kBlock = 4096;  // outputs summed at once, so that the sums of kTokens fit into the second-level cache
constexpr int64_t kUnitBlock = 64;  // units of one task, for dim 0

// From this number of tokens on, PyTorch's product is faster. In 16-bit types it uses instructions that compilers
// don't.
template <class T>
constexpr int64_t kProductRows = sizeof(T) == 2 ? 16 : 48;

// ---- kernels -----------------------------------------------------------------------------------------
//
// With four tokens, four rows at once are held in registers. With one token, reading takes most of the time. It is
// fastest, by measurement on one core, to read four rows of float32 at once, and in 16-bit types to read row by row.
// The 16-bit rows are prefetched this far ahead, because processors stop their own prefetching at the end of a page.
// The other choice takes up to 1.5 times as long.
constexpr int64_t kBytesAhead = 16384;
template <class T>
constexpr int kRows = sizeof(T) == 2 ? 1 : 4;

template <class T>
S2FT_INLINE void prefetch_ahead(const T* at, int count) {
  for (int i = 0; i < count; i += 64 / sizeof(T))
    __builtin_prefetch(reinterpret_cast<const char*>(at + i) + kBytesAhead, 0, 3);
}

// sum[t][:] += Σ_k factor[t][k] * row[k][:]. Row k starts `stride` after row k - 1. An iteration handles `Steps`
// vectors.
template <int Tokens, int Units, int Steps, class T, class A>
S2FT_INLINE void add_units(const T* rows, int64_t stride, const A* factor, int64_t factor_stride, A* const* sum,
                           int64_t width) {
  constexpr int kCount = Lanes<A>::kCount;
  A by[Tokens][Units], *to[Tokens];  // copies, which a store to a sum can't change
  for (int t = 0; t < Tokens; ++t) {
    to[t] = sum[t];
    for (int k = 0; k < Units; ++k) by[t][k] = factor[t * factor_stride + k];
  }
  int64_t i = 0;
  for (; i + Steps * kCount <= width; i += Steps * kCount) {
    if (Units == 1) prefetch_ahead(rows + i, Steps * kCount);
    for (int s = 0; s < Steps; ++s) {
      Vector<A> row[Units];
      for (int k = 0; k < Units; ++k) row[k] = load_lanes<A>(rows + k * stride + i + s * kCount);
      for (int t = 0; t < Tokens; ++t) {
        Vector<A> total = load_lanes<A>(to[t] + i + s * kCount);
        for (int k = 0; k < Units; ++k) total += row[k] * by[t][k];
        store_lanes<A>(total, to[t] + i + s * kCount);
      }
    }
  }
  for (; i < width; ++i)
    for (int t = 0; t < Tokens; ++t)
      for (int k = 0; k < Units; ++k) to[t][i] += by[t][k] * static_cast<A>(widen(rows[k * stride + i]));
}

// dot[t][k] = x[t] · row[k]. Each uses `Sums` independent sums, so that additions do not wait for each other.
template <int Tokens, int Units, int Sums, class T, class A>
S2FT_INLINE void dot_units(const T* rows, int64_t stride, const A* const* x, A* dot, int64_t dot_stride,
                           int64_t width) {
  constexpr int kCount = Lanes<A>::kCount;
  Vector<A> sum[Tokens][Units][Sums] = {};
  int64_t i = 0;
  for (; i + Sums * kCount <= width; i += Sums * kCount) {
    if (Units == 1) prefetch_ahead(rows + i, Sums * kCount);
    for (int s = 0; s < Sums; ++s) {
      Vector<A> row[Units];
      for (int k = 0; k < Units; ++k) row[k] = load_lanes<A>(rows + k * stride + i + s * kCount);
      for (int t = 0; t < Tokens; ++t) {
        const Vector<A> token = load_lanes<A>(x[t] + i + s * kCount);
        for (int k = 0; k < Units; ++k) sum[t][k][s] += token * row[k];
      }
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int k = 0; k < Units; ++k) {
      Vector<A> lanes = sum[t][k][0];
      for (int s = 1; s < Sums; ++s) lanes += sum[t][k][s];
      A total = sum_of<A>(lanes);
      for (int64_t j = i; j < width; ++j) total += x[t][j] * static_cast<A>(widen(rows[k * stride + j]));
      dot[t * dot_stride + k] = total;
    }
}

template <class T, class A>
S2FT_INLINE void add_tile(const T* rows, int64_t units, int64_t stride, const A* factor, A* const* sum, int tokens,
                          int64_t width) {
  int64_t k = 0;
  if (tokens == kTokens)
    for (; k + 4 <= units; k += 4) add_units<kTokens, 4, 1>(rows + k * stride, stride, factor + k, units, sum, width);
  else
    for (; k + kRows<T> <= units; k += kRows<T>)
      for (int t = 0; t < tokens; ++t)
        add_units<1, kRows<T>, 4>(rows + k * stride, stride, factor + t * units + k, units, sum + t, width);
  for (; k < units; ++k)
    for (int t = 0; t < tokens; ++t)
      add_units<1, 1, 4>(rows + k * stride, stride, factor + t * units + k, units, sum + t, width);
}

template <class T, class A>
S2FT_INLINE void dot_tile(const T* rows, int64_t units, int64_t stride, const A* const* x, A* dot, int tokens,
                          int64_t width) {
  int64_t k = 0;
  if (tokens == kTokens)
    for (; k + 4 <= units; k += 4) dot_units<kTokens, 4, 1>(rows + k * stride, stride, x, dot + k, units, width);
  else
    for (; k + kRows<T> <= units; k += kRows<T>)
      for (int t = 0; t < tokens; ++t)
        dot_units<1, kRows<T>, 4 / kRows<T>>(rows + k * stride, stride, x + t, dot + t * units + k, units, width);
  for (; k < units; ++k)
    for (int t = 0; t < tokens; ++t)
      dot_units<1, 1, 4>(rows + k * stride, stride, x + t, dot + t * units + k, units, width);
}

#define S2FT_DEFINE_TILES(T, A)                                                                                    \
  S2FT_CLONES S2FT_FUSED void add_rows_of(const T* rows, int64_t units, int64_t stride, const A* factor,           \
                                          A* const* sum, int tokens, int64_t width) {                              \
    add_tile(rows, units, stride, factor, sum, tokens, width);                                                     \
  }                                                                                                                \
  S2FT_CLONES S2FT_FUSED void dot_rows_of(const T* rows, int64_t units, int64_t stride, const A* const* x, A* dot, \
                                          int tokens, int64_t width) {                                             \
    dot_tile(rows, units, stride, x, dot, tokens, width);                                                          \
  }
S2FT_DEFINE_TILES(float, float)
S2FT_DEFINE_TILES(double, double)
S2FT_DEFINE_TILES(BFloat16, float)
S2FT_DEFINE_TILES(Half, float)
#undef S2FT_DEFINE_TILES

// ---- tasks -------------------------------------------------------------------------------------------

// The tokens of one adapter, as row numbers of x and out.
struct Group {
  int64_t adapter;
  const int64_t* token;
  int64_t tokens;
};

// Writes the tokens of all groups to `token`, one group after the other. The groups point into it.
std::vector<Group> groups_of(const Bank& bank, const Batch& batch, std::vector<int64_t>* token) {
  std::vector<int64_t> sequences;
  sequences.reserve(static_cast<size_t>(batch.sequences));
  for (int64_t b = 0; b < batch.sequences; ++b)
    if (batch.adapter[b] >= 0 && bank.offsets[batch.adapter[b]] < bank.offsets[batch.adapter[b] + 1])
      sequences.push_back(b);
  const auto by_adapter = [&](int64_t a, int64_t b) { return batch.adapter[a] < batch.adapter[b]; };
  if (!std::is_sorted(sequences.begin(), sequences.end(), by_adapter))
    std::stable_sort(sequences.begin(), sequences.end(), by_adapter);
  token->reserve(sequences.size() * static_cast<size_t>(batch.tokens));  // so that the pointers into it stay valid
  std::vector<Group> groups;
  for (int64_t b : sequences) {
    if (groups.empty() || groups.back().adapter != batch.adapter[b])
      groups.push_back({batch.adapter[b], token->data() + token->size(), 0});
    for (int64_t t = 0; t < batch.tokens; ++t) token->push_back(b * batch.tokens + t);
    groups.back().tokens += batch.tokens;
  }
  return groups;
}

// The work of one thread at a time: a few tokens, and a block of the adapter's units (dim 0) or of the outputs (dim 1).
struct Task {
  int64_t adapter, first, count;  // first and count of units or outputs
  const int64_t* token;
  int tokens;
};

std::vector<Task> tasks_of(const Bank& bank, const std::vector<Group>& groups) {
  std::vector<Task> tasks;
  for (const Group& group : groups) {
    const int64_t size = bank.outputs ? bank.offsets[group.adapter + 1] - bank.offsets[group.adapter] : bank.width;
    const int64_t step = bank.outputs ? kUnitBlock : kBlock;
    for (int64_t first = 0; first < size; first += step)
      for (int64_t t = 0; t < group.tokens; t += kTokens)
        tasks.push_back({group.adapter, first, std::min(step, size - first), group.token + t,
                         static_cast<int>(std::min<int64_t>(kTokens, group.tokens - t))});
  }
  return tasks;
}

// Memory for `count` numbers. The thread keeps it for its next tasks.
template <class A>
A* scratch(int64_t count) {
  thread_local std::vector<A> room;
  if (static_cast<int64_t>(room.size()) < count) room.resize(static_cast<size_t>(count));
  return room.data();
}

// dim 0: adds the tokens' dot products with the task's units to the outputs of these units.
template <class T, class A>
void add_outputs(const Bank& bank, const Batch& batch, const Task& task) {
  const int64_t begin = bank.offsets[task.adapter] + task.first, width = bank.width;
  A dot[kTokens * kUnitBlock];
  const A* x[kTokens];
  for (int t = 0; t < task.tokens; ++t) {
    const T* token = static_cast<const T*>(batch.x) + task.token[t] * width;
    if constexpr (std::is_same_v<T, A>) {
      x[t] = token;
    } else {
      A* wide = scratch<A>(task.tokens * width) + t * width;
      widen_span(token, wide, width);
      x[t] = wide;
    }
  }
  dot_rows_of(static_cast<const T*>(bank.values) + begin * width, task.count, width, x, dot, task.tokens, width);
  for (int t = 0; t < task.tokens; ++t) {
    T* out = static_cast<T*>(batch.out) + task.token[t] * batch.outputs;
    for (int64_t k = 0; k < task.count; ++k) {
      T& at = out[bank.index[begin + k]];
      at = narrow<T>(static_cast<A>(widen(at)) + dot[t * task.count + k]);
    }
  }
}

// dim 1: adds to a block of the tokens' outputs the row of every unit times the unit's input.
template <class T, class A>
void add_inputs(const Bank& bank, const Batch& batch, const Task& task) {
  const int64_t begin = bank.offsets[task.adapter], units = bank.offsets[task.adapter + 1] - begin;
  A* factor = scratch<A>(task.tokens * (units + kBlock));
  A *sums = factor + task.tokens * units, *sum[kTokens];
  const auto out = [&](int t) { return static_cast<T*>(batch.out) + task.token[t] * batch.outputs + task.first; };
  for (int t = 0; t < task.tokens; ++t) {
    const T* x = static_cast<const T*>(batch.x) + task.token[t] * batch.inputs;
    for (int64_t k = 0; k < units; ++k) factor[t * units + k] = static_cast<A>(widen(x[bank.index[begin + k]]));
    if constexpr (std::is_same_v<T, A>) {
      sum[t] = out(t);
    } else {
      sum[t] = sums + t * kBlock;
      widen_span(out(t), sum[t], task.count);
    }
  }
  add_rows_of(static_cast<const T*>(bank.values) + begin * bank.width + task.first, units, bank.width, factor, sum,
              task.tokens, task.count);
  if constexpr (!std::is_same_v<T, A>)
    for (int t = 0; t < task.tokens; ++t) narrow_span(sum[t], out(t), task.count);
}

// Distributes the tasks over the threads by their work and not by their number, because adapters differ in size.
template <class T, class A>
void run_tasks(const Bank& bank, const Batch& batch, const std::vector<Task>& tasks) {
  std::vector<int64_t> before{0};  // elements of the bank read by the tasks before this one
  for (const Task& task : tasks)
    before.push_back(before.back() +
                     task.tokens * (bank.outputs
                                        ? task.count * bank.width
                                        : (bank.offsets[task.adapter + 1] - bank.offsets[task.adapter]) * task.count));
  const auto task_at = [&](int64_t work) {
    return std::lower_bound(before.begin(), before.end() - 1, work) - before.begin();
  };
  parallel_lines(before.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = task_at(begin), last = task_at(end); i < last; ++i)
      bank.outputs ? add_outputs<T, A>(bank, batch, tasks[i]) : add_inputs<T, A>(bank, batch, tasks[i]);
  });
}

// ---- large groups --------------------------------------------------------------------------------------

// x of the group's tokens: all inputs for dim 0, the inputs of the adapter's units for dim 1.
template <class T>
Tensor gathered(const Bank& bank, const Batch& batch, const Group& group, const Tensor& x) {
  const int64_t begin = bank.offsets[group.adapter], units = bank.offsets[group.adapter + 1] - begin;
  const int64_t tokens = group.tokens, columns = bank.outputs ? batch.inputs : units;
  if (bank.outputs && group.token[tokens - 1] - group.token[0] + 1 == tokens) {  // neighbouring tokens need no copy
    Tensor rows = torch::stable::view(x, {batch.sequences * batch.tokens, batch.inputs});
    return torch::stable::narrow(rows, 0, group.token[0], tokens);
  }
  Tensor taken = torch::stable::new_empty(x, {tokens, columns});
  T* to = static_cast<T*>(taken.mutable_data_ptr());
  parallel_lines(tokens, columns, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const T* from = static_cast<const T*>(batch.x) + group.token[m] * batch.inputs;
      if (bank.outputs)
        std::copy(from, from + columns, to + m * columns);
      else
        for (int64_t k = 0; k < units; ++k) to[m * columns + k] = from[bank.index[begin + k]];
    }
  });
  return taken;
}

// out = y + product, for the group's tokens.
template <class T>
void add_product(const Bank& bank, const Batch& batch, const Group& group, const T* product) {
  const int64_t begin = bank.offsets[group.adapter], units = bank.offsets[group.adapter + 1] - begin;
  parallel_lines(group.tokens, batch.outputs, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const T* y = static_cast<const T*>(batch.y) + group.token[m] * batch.outputs;
      T* out = static_cast<T*>(batch.out) + group.token[m] * batch.outputs;
      if (!bank.outputs) {
        add_span(y, product + m * batch.outputs, 1, out, batch.outputs);
        continue;
      }
      std::copy(y, y + batch.outputs, out);
      for (int64_t k = 0; k < units; ++k) {
        T& at = out[bank.index[begin + k]];
        at = add(at, product[m * units + k]);
      }
    }
  });
}

template <class T>
void run_product(const Bank& bank, const Batch& batch, const Group& group, const Tensor& x, const Tensor& values) {
  const int64_t begin = bank.offsets[group.adapter], units = bank.offsets[group.adapter + 1] - begin;
  Tensor all = values;
  const Tensor rows = torch::stable::narrow(all, 0, begin, units), taken = gathered<T>(bank, batch, group, x);
  // Inside autocast the product has autocast's dtype.
  const Tensor product =
      aten::type_as(bank.outputs ? aten::linear(taken, rows, std::nullopt) : aten::matmul(taken, rows), values);
  add_product(bank, batch, group, static_cast<const T*>(product.const_data_ptr()));
}

// out = y, for the tokens of small groups. run_products() writes the others.
template <class T>
void copy_base(const Batch& batch, const std::vector<bool>& written) {
  parallel_lines(batch.sequences, batch.tokens * batch.outputs, [&](int64_t begin, int64_t end) {
    const int64_t size = batch.tokens * batch.outputs;
    for (int64_t b = begin; b < end; ++b) {
      if (written[b]) continue;
      const T* y = static_cast<const T*>(batch.y) + b * size;
      std::copy(y, y + size, static_cast<T*>(batch.out) + b * size);
    }
  });
}

// Distributes the groups over the threads, one product per group. If all threads worked on one group after the other,
// they would have to synchronise after each of many small products.
template <class T>
void run_products(const Bank& bank, const Batch& batch, const std::vector<Group>& groups, const Tensor& x,
                  const Tensor& values) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) run_product<T>(bank, batch, groups[g], x, values);
  };
  const int64_t count = static_cast<int64_t>(groups.size());
  count > 1 ? torch::stable::parallel_for(0, count, 1, run) : run(0, count);
}

template <class T>
void add_all(const Bank& bank, const Batch& batch, const Tensor& x, const Tensor& values) {
  std::vector<int64_t> token;
  std::vector<Group> small = groups_of(bank, batch, &token), large;
  std::vector<bool> written(static_cast<size_t>(batch.sequences));
  const auto many = [](const Group& group) { return group.tokens >= kProductRows<T>; };
  std::copy_if(small.begin(), small.end(), std::back_inserter(large), many);
  std::erase_if(small, many);
  for (const Group& group : large)
    for (int64_t t = 0; t < group.tokens; t += batch.tokens) written[group.token[t] / batch.tokens] = true;
  copy_base<T>(batch, written);
  run_products<T>(bank, batch, large, x, values);
  run_tasks<T, Wide<T, T>>(bank, batch, tasks_of(bank, small));
}

struct CpuMultiAdapter {
  explicit CpuMultiAdapter(const Tensor&) {}
  void add(const Bank& bank, const Batch& batch, DType dtype, const Tensor& x, const Tensor& values) const {
    visit(dtype, [&](auto tag) { add_all<typename decltype(tag)::type>(bank, batch, x, values); });
  }
};

}  // namespace
}  // namespace s2ft

STABLE_TORCH_LIBRARY_IMPL(s2ft, CPU, m) {
  m.impl("multi_adapter_linear", TORCH_BOX(&s2ft::multi_adapter_linear<s2ft::CpuMultiAdapter>));
}
