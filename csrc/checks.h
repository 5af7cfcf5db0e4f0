// Argument checks. Each message names the op and the argument. std::invalid_argument becomes ValueError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "core/numeric.h"

namespace s2ft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "s2ft::" << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A shape in a message. It becomes text only when a check has failed: the streams of five texts took 5 µs a call.
struct Shape {
  const Tensor& t;
};

inline Shape shape_of(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << '(';
  for (int64_t d = 0; d < shape.t.dim(); ++d) text << (d ? ", " : "") << shape.t.size(d);
  return text << (shape.t.dim() == 1 ? ",)" : ")");
}

inline DType dtype_of(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      require(false, op, argument, " must be float32, float64, float16 or bfloat16, got ",
              torch::headeronly::toString(t.scalar_type()));
      return DType::f32;
  }
}

inline void check_same_device(const Tensor& t, const Tensor& weight, const char* op, const char* argument) {
  const bool same = t.is_cpu() == weight.is_cpu() && t.get_device_index() == weight.get_device_index();
  require(same, op, argument, " must be on weight's device");
}

inline void check_index_tensor(const Tensor& index, int64_t length, const Tensor& weight, const char* op,
                               const char* argument) {
  const bool fits = index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.size(0) == length;
  require(fits, op, argument, " must be int64 of shape (", length, ",), got ",
          torch::headeronly::toString(index.scalar_type()), " of shape ", shape_of(index));
  check_same_device(index, weight, op, argument);
}

// Checks the entries of an index. The index must be in host memory.
inline void check_index_range(const int64_t* index, int64_t length, int64_t limit, const char* op,
                              const char* argument) {
  for (int64_t k = 0; k < length; ++k)
    require(index[k] >= 0 && index[k] < limit, op, argument, " has ", index[k], ", outside 0..", limit - 1);
}

// True if two elements may share memory, judged by sizes and strides. In doubtful cases it returns true.
inline bool may_overlap(const Tensor& t) {
  if (t.numel() <= 1) return false;
  // In the order of the strides, each dimension must step over the whole span of the smaller ones.
  int64_t spanned = 0;
  bool used[8] = {};
  if (t.dim() > 8) return true;
  for (int64_t round = 0; round < t.dim(); ++round) {
    int64_t next = -1;
    for (int64_t d = 0; d < t.dim(); ++d)
      if (!used[d] && (next < 0 || t.stride(d) < t.stride(next))) next = d;
    used[next] = true;
    if (t.size(next) == 1) continue;
    if (t.stride(next) <= spanned) return true;
    spanned += (t.size(next) - 1) * t.stride(next);
  }
  return false;
}

}  // namespace s2ft
