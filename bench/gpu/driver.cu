// Runs every kernel of csrc/cuda without PyTorch, in buffers of the exact size, and compares each result with a loop on
// the host. It needs a second, so that compute-sanitizer and Nsight Compute can run it. bench/gpu/kernel_driver.py
// compiles it for a GPU, or for the CPU with the simulator of tests/cuda_on_cpu.
//
//     driver [--large | --overrun] [--seed N] [--blocks N]
//
// --large adds sizes beyond one wave of blocks. --overrun does one thing only: a kernel writes one element behind a
// buffer, which a sanitizer must find. --seed and --blocks are of the simulator: the order of the threads, and
// the largest number of blocks of a launch. The exit status is 1 if a number is wrong, and 2 if a call failed.
#include <algorithm>
#include <memory>
#include <numeric>
#include <string>

#include "device.h"
#include "host.h"

using namespace s2ft;
using host::Format;
using host::rounded;
using host::value;

namespace {

int checks = 0, failures = 0;

void check(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("WRONG %s\n", what.c_str());
}

// Every kernel is launched through this. A launch that fails ends the program.
void launched(int error, const std::string& what) {
  if (error == 0) return;
  std::printf("%s: %s\n", what.c_str(), cuda::error_text(error));
  std::exit(2);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

std::vector<int64_t> shuffled(int64_t size) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), host::random_numbers());
  return order;
}

template <class T>
const char* name_of() {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(Format<T>::dtype)];
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string all;
  ((all += parts, all += ' '), ...);
  return all;
}
std::string number(int64_t n) { return std::to_string(n); }

// --- base + delta in rows or columns -----------------------------------------------------------------

// Some rows or columns of a weight of outputs × inputs.
struct Case {
  int64_t outputs, inputs, units, start;
  bool rows, scattered;

  int64_t limit() const { return rows ? outputs : inputs; }
  int64_t elements() const { return units * (rows ? inputs : outputs); }
  std::string name() const {
    return text(number(outputs), "x", number(inputs), number(units), rows ? "rows" : "columns",
                scattered ? "by index" : "from " + number(start));
  }
  // With an index, the first and the last unit are outside the weight if there are more than two.
  std::vector<int64_t> places() const {
    std::vector<int64_t> index(units);
    if (!scattered) {
      std::iota(index.begin(), index.end(), start);
      return index;
    }
    const auto order = shuffled(limit());
    std::copy_n(order.begin(), units, index.begin());
    if (units > 2) index.front() = -1, index.back() = limit();
    return index;
  }
  // Calls f(place in the weights, place in the dense slice) for every element of a unit inside the weight.
  template <class F>
  void each(const std::vector<int64_t>& index, F&& f) const {
    for (int64_t k = 0; k < units; ++k) {
      if (index[k] < 0 || index[k] >= limit()) continue;
      for (int64_t i = 0; i < (rows ? inputs : outputs); ++i)
        rows ? f(index[k] * inputs + i, k * inputs + i) : f(i * inputs + index[k], i * units + k);
    }
  }
  Units arguments(const int64_t* index) const {
    Units u{};
    u.index = scattered ? index : nullptr;
    u.start = start;
    u.limit = limit();
    u.outer = rows ? units : outputs;
    u.inner = rows ? inputs : units;
    u.outer_stride = inputs;
    u.inner_stride = 1;
    u.rows = rows;
    return u;
  }
};

template <class W, class D>
void slices(const Case& slice) {
  const std::string what = text(name_of<W>(), name_of<D>(), slice.name());
  const auto before = host::normal<W>(slice.outputs * slice.inputs);
  const auto change = host::normal<D>(slice.elements());
  const auto index = slice.places();
  const auto kept = host::normal<W>(slice.elements());
  Buffer<W> weight(before), base(kept);
  Buffer<D> delta(change);
  Buffer<int64_t> places(index);
  const Slice task{
      slice.arguments(places.at()), Format<W>::dtype, Format<D>::dtype, weight.at(), base.at(), delta.at()};
  auto expected = before;
  slice.each(index,
             [&](int64_t at, int64_t flat) { expected[at] = host::stored<W>(host::sum(kept[flat], change[flat])); });
  launched(cuda::write_slices(&task, 1, nullptr), "write_slices " + what);
  check(same_bits(weight.host(), expected), "write_slices: " + what);
}

template <class W, class D>
void all_slices() {
  for (bool rows : {false, true})
    for (bool scattered : {false, true}) {
      slices<W, D>({37, 64, 8, 8, rows, scattered});
      slices<W, D>({40, 64, 24, 0, rows, scattered});
      slices<W, D>({33, 57, 11, 3, rows, scattered});
      slices<W, D>({33, 57, 1, 32, rows, scattered});
      slices<W, D>({5, 7, 0, 0, rows, scattered});
    }
}

// --- columns and rows that move ----------------------------------------------------------------------

// A matrix of outputs × inputs along its columns (1) or rows (0), as csrc/move.h describes a tensor.
Along along(int64_t outputs, int64_t inputs, bool columns, int64_t units) {
  return columns ? Along{units, 1, outputs, 1, 0, units, true} : Along{units, 1, inputs, inputs, 0, 1, false};
}

template <class T>
void moves(int64_t outputs, int64_t inputs, bool columns) {
  const std::string what =
      text(number(sizeof(T)), "bytes", number(outputs), "x", number(inputs), columns ? "columns" : "rows");
  const int64_t units = columns ? inputs : outputs;
  std::vector<T> before(outputs * inputs);
  for (T& one : before) one = static_cast<T>(host::random_numbers()());
  const auto order = shuffled(units);
  Buffer<int64_t> places(order);
  const Along whole = along(outputs, inputs, columns, units);
  {
    Buffer<T> weight(before);
    const int64_t bytes = cuda::permute_scratch_bytes(whole, sizeof(T));
    Buffer<uint8_t> scratch(bytes);
    launched(cuda::permute_units(whole, places.at(), sizeof(T), weight.at(), scratch.at(), bytes, nullptr),
             "permute_units " + what);
    auto expected = before;
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i)
        expected[o * inputs + i] = columns ? before[o * inputs + order[i]] : before[order[o] * inputs + i];
    check(same_bits(weight.host(), expected), "permute_units: " + what);
  }
  const int64_t few = units / 3 + 1;
  std::vector<T> others(columns ? outputs * few : few * inputs);
  for (T& one : others) one = static_cast<T>(host::random_numbers()());
  Buffer<T> weight(before), values(others);
  const Exchange exchange{whole, along(outputs, inputs, columns, few), places.at()};
  launched(cuda::exchange_units(exchange, sizeof(T), weight.at(), values.at(), nullptr), "exchange_units " + what);
  auto expected = before, held = others;
  for (int64_t k = 0; k < few; ++k)
    for (int64_t i = 0; i < (columns ? outputs : inputs); ++i)
      std::swap(expected[columns ? i * inputs + order[k] : order[k] * inputs + i],
                held[columns ? i * few + k : k * inputs + i]);
  check(same_bits(weight.host(), expected) && same_bits(values.host(), held), "exchange_units: " + what);
  launched(cuda::exchange_units(exchange, sizeof(T), weight.at(), values.at(), nullptr), "exchange_units " + what);
  check(same_bits(weight.host(), before) && same_bits(values.host(), others), "exchange_units twice: " + what);
}

// weight += alpha * delta for `count` deltas that share units.
template <class W, class D>
void scattered(int64_t count, bool columns, bool keeps) {
  const int64_t outputs = 21, inputs = 40, units = 9;
  const std::string what = text(name_of<W>(), name_of<D>(), number(count), "deltas", columns ? "columns" : "rows");
  const Along whole = along(outputs, inputs, columns, columns ? inputs : outputs);
  const Along slice = along(outputs, inputs, columns, units);
  const auto before = host::normal<W>(outputs * inputs);
  const int64_t length = columns ? outputs : inputs;
  std::vector<std::vector<int64_t>> index(count);
  std::vector<std::vector<D>> change(count);
  for (int64_t j = 0; j < count; ++j) {
    index[j] = shuffled(columns ? inputs : outputs);
    index[j].resize(units);
    change[j] = host::normal<D>(units * length);
  }
  std::vector<std::unique_ptr<Buffer<int64_t>>> places;
  std::vector<std::unique_ptr<Buffer<D>>> deltas;
  std::vector<std::unique_ptr<Buffer<W>>> old;
  std::vector<Part> parts;
  for (int64_t j = 0; j < count; ++j) {
    places.push_back(std::make_unique<Buffer<int64_t>>(index[j]));
    deltas.push_back(std::make_unique<Buffer<D>>(change[j]));
    old.push_back(std::make_unique<Buffer<W>>(size_t(units * length)));
    parts.push_back(
        {slice, slice, deltas[j]->at(), keeps ? old[j]->at() : nullptr, places[j]->at(), 0.5 + 0.25 * (j % 3)});
  }
  Buffer<W> weight(before);
  const Scatter scatter{whole, weight.at(), Format<W>::dtype, Format<D>::dtype, parts.data(), count, keeps};
  Buffer<int64_t> scratch(size_t(cuda::scatter_scratch_bytes(scatter) + 7) / 8);
  launched(cuda::scatter_add_units(scatter, scratch.at(), nullptr), "scatter_add_units " + what);
  std::vector<double> exact(before.size()), size(before.size());
  for (size_t i = 0; i < before.size(); ++i) exact[i] = value(before[i]), size[i] = std::abs(exact[i]);
  bool kept = true;
  for (int64_t j = 0; j < count; ++j) {
    const auto held = keeps ? old[j]->host() : std::vector<W>();
    for (int64_t k = 0; k < units; ++k)
      for (int64_t i = 0; i < length; ++i) {
        const int64_t at = columns ? i * inputs + index[j][k] : index[j][k] * inputs + i;
        const int64_t flat = columns ? i * units + k : k * inputs + i;
        exact[at] += parts[j].alpha * value(change[j][flat]);
        size[at] += std::abs(parts[j].alpha * value(change[j][flat]));
        if (keeps) kept &= std::memcmp(&held[flat], &before[at], sizeof(W)) == 0;
      }
  }
  const auto got = weight.host();
  bool right = true;
  for (size_t i = 0; i < got.size(); ++i)  // one rounding to the weight's type, and 2 * count to float
    right &= std::abs(value(got[i]) - exact[i]) <= host::step<W>(exact[i]) + 2 * count * size[i] * 0x1p-24;
  check(right, "scatter_add_units: " + what);
  check(kept, "scatter_add_units, old values: " + what);
}

// --- activations ---------------------------------------------------------------------------------------

// Allowed error relative to the size of the terms: a few roundings, in float at best.
template <class T>
double allowed() {
  return 3 * std::ldexp(1.0, -std::min(Format<T>::digits, 22));
}

// The tensors begin `offset` elements after an address that is a multiple of 16, so 1 takes the unaligned path.
template <class T>
void activations(Activation activation, int64_t size, int64_t offset) {
  const std::string what = text(name_of<T>(), "activation", number(static_cast<int>(activation)), number(size),
                                "elements at", number(offset));
  const auto gates = host::normal<T>(size + offset), ups = host::normal<T>(size + offset),
             grads = host::normal<T>(size + offset);
  Buffer<T> gate(gates), up(ups), grad(grads), out(size), grad_gate(size), grad_up(size);
  ActMulData data{};
  data.dtype = Format<T>::dtype;
  data.size = data.columns = data.gate_row = data.up_row = size;
  data.gate = gate.at() + offset;
  data.up = up.at() + offset;
  data.out = out.at();
  data.grad = grad.at() + offset;
  data.grad_gate = grad_gate.at();
  data.grad_up = grad_up.at();
  launched(cuda::act_mul(activation, data, nullptr), "act_mul " + what);
  launched(cuda::act_mul_backward(activation, data, nullptr), "act_mul_backward " + what);
  const auto y = out.host(), dg = grad_gate.host(), du = grad_up.host();
  bool forward = true, backward = true;
  for (int64_t i = 0; i < size; ++i) {
    const double g = value(gates[i + offset]), u = value(ups[i + offset]), d = value(grads[i + offset]);
    const host::Gate one = host::gate_of(activation, g);
    // The argument of the exponential is rounded too, so its error grows with the gate.
    const auto near = [g](T got, double exact, double terms) {
      return std::abs(value(got) - exact) <= allowed<T>() * std::max(1.0, std::abs(g)) * terms + host::step<T>(exact);
    };
    forward &= near(y[i], one.act * u, std::abs(one.act * u));
    backward &= near(dg[i], d * u * one.derivative, std::abs(d * u)) && near(du[i], d * one.act, std::abs(d * one.act));
  }
  check(forward, "act_mul: " + what);
  check(backward, "act_mul_backward: " + what);
}

template <class T>
void all_activations() {
#define S2FT_RUN(name, Act)                    \
  for (int64_t size : {0, 1, 7, 64, 2051}) {   \
    activations<T>(Activation::name, size, 0); \
    activations<T>(Activation::name, size, 1); \
  }
  S2FT_ACTIVATIONS(S2FT_RUN)
#undef S2FT_RUN
}

// --- a batch with an adapter for each sequence ---------------------------------------------------------

// Every block of add_adapters has its own part of the output. Its launches can't have fewer blocks.
void allow_all_blocks() {
#ifdef S2FT_CUDA_ON_CPU
  simulator::machine().max_blocks = 0;
#endif
}

template <class T>
void adapters(int64_t tokens, int64_t inputs, int64_t outputs, int64_t per, bool dim0) {
  const int64_t sequences = 5, count = 3, width = dim0 ? inputs : outputs;
  const std::string what = text(name_of<T>(), dim0 ? "dim 0" : "dim 1", number(tokens), "tokens", number(inputs), "->",
                                number(outputs), number(per), "units");
  const auto x = host::normal<T>(sequences * tokens * inputs), y = host::normal<T>(sequences * tokens * outputs),
             values = host::normal<T>(per * count * width);
  std::vector<int64_t> index, offsets{0};
  for (int64_t a = 0; a < count; ++a) {
    const auto order = shuffled(dim0 ? outputs : inputs);
    index.insert(index.end(), order.begin(), order.begin() + per);
    offsets.push_back(per * (a + 1));
  }
  const std::vector<int64_t> names{2, -1, 0, count, 1};  // -1 and `count` are no adapters
  Buffer<T> from(x), to(y), bank_values(values), out(y.size());
  Buffer<int64_t> places(index), ends(offsets), of_sequence(names);
  const Bank bank{bank_values.at(), places.at(), ends.at(), count, per * count, width, dim0};
  const Batch batch{from.at(), to.at(), out.at(), of_sequence.at(), sequences, tokens, inputs, outputs};
  launched(cuda::add_adapters(bank, batch, Format<T>::dtype, nullptr), "add_adapters " + what);
  const auto got = out.host();
  bool right = true;
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t t = s * tokens; t < (s + 1) * tokens; ++t) {
      std::vector<double> exact(outputs), size(outputs);
      for (int64_t o = 0; o < outputs; ++o) exact[o] = value(y[t * outputs + o]), size[o] = std::abs(exact[o]);
      for (int64_t k = 0; names[s] >= 0 && names[s] < count && k < per; ++k) {
        const int64_t unit = names[s] * per + k;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t o = dim0 ? index[unit] : j, i = dim0 ? j : index[unit];
          const double product = value(values[unit * width + j]) * value(x[t * inputs + i]);
          exact[o] += product;
          size[o] += std::abs(product);
        }
      }
      for (int64_t o = 0; o < outputs; ++o)  // the sum may be rounded to T twice, and is accumulated in float
        right &= std::abs(value(got[t * outputs + o]) - exact[o]) <=
                 host::step<T>(exact[o]) + allowed<T>() * size[o] + size[o] * width * 0x1p-24;
    }
  check(right, "add_adapters: " + what);
}

template <class T>
void all_adapters() {
  for (bool dim0 : {false, true})
    for (int64_t tokens : {1, 3, 17}) {
      adapters<T>(tokens, 64, 136, 8, dim0);
      adapters<T>(tokens, 37, 45, 5, dim0);
    }
}

// A fault on purpose: `out` is one element too short.
void overrun() {
  const int64_t size = 1000;
  Buffer<float> gate(host::normal<float>(size)), up(host::normal<float>(size)), out(size - 1);
  ActMulData data{};
  data.dtype = DType::f32;
  data.size = data.columns = data.gate_row = data.up_row = size;
  data.gate = gate.at();
  data.up = up.at();
  data.out = out.at();
  launched(cuda::act_mul(Activation::relu, data, nullptr), "act_mul");
  must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

// Sizes beyond one wave of blocks.
void large() {
  activations<BFloat16>(Activation::silu, (int64_t{1} << 24) + 8 * 256 + 3, 0);
  slices<BFloat16, float>({4096, 14336, 430, 333, false, false});
  slices<BFloat16, float>({4096, 14336, 430, 0, false, true});
  slices<BFloat16, float>({4096, 4096, 512, 8, true, false});
  moves<uint16_t>(1031, 14336, true);
  adapters<BFloat16>(64, 4096, 1024, 64, false);
  adapters<BFloat16>(64, 1024, 1024, 64, true);
}

void everything() {
  all_slices<float, float>();
  all_slices<double, float>();
  all_slices<BFloat16, float>();
  all_slices<BFloat16, BFloat16>();
  all_slices<Half, float>();
  for (bool columns : {false, true}) {
    moves<uint8_t>(33, 57, columns);
    moves<uint16_t>(40, 64, columns);
    moves<uint16_t>(33, 57, columns);
    moves<uint32_t>(40, 64, columns);
    moves<uint64_t>(33, 57, columns);
    for (int64_t count : {1, 3, 40})
      for (bool keeps : {false, true}) {
        scattered<float, float>(count, columns, keeps);
        scattered<BFloat16, float>(count, columns, keeps);
        scattered<Half, Half>(count, columns, keeps);
      }
  }
  all_activations<float>();
  all_activations<double>();
  all_activations<Half>();
  all_activations<BFloat16>();
  allow_all_blocks();
  all_adapters<float>();
  all_adapters<double>();
  all_adapters<Half>();
  all_adapters<BFloat16>();
}

}  // namespace

int main(int count, char** arguments) {
  bool with_large = false, only_overrun = false;
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    if (option == "--large") {
      with_large = true;
    } else if (option == "--overrun") {
      only_overrun = true;
#ifdef S2FT_CUDA_ON_CPU
    } else if (option == "--seed" && i + 1 < count) {
      simulator::machine().seed = static_cast<unsigned>(std::stoul(arguments[++i]));
    } else if (option == "--blocks" && i + 1 < count) {
      simulator::machine().max_blocks = static_cast<unsigned>(std::stoul(arguments[++i]));
#endif
    } else {
      std::printf("no option %s\n", option.c_str());
      return 2;
    }
  }
  if (only_overrun) return overrun(), 0;
  everything();
  if (with_large) large();
  must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::printf("%d checks, %d wrong\n", checks, failures);
  return failures != 0;
}
