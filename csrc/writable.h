// Checks that memory is writable. A weight may be in a read-only mapping (a NumPy memmap of mode "r"), and a write to
// it would end the process with SIGSEGV.
#pragma once

#include "checks.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace s2ft {

// Tells the operating system to "or" the word at `memory` with 0. This takes 0.1 µs, and fails with EFAULT if a write
// would fault.
inline bool is_writable(void* memory) {
#ifdef __linux__
  uint32_t unused = 0;
  void* const word = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) & ~uintptr_t{3});
  const int or_zero = FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, 0);
  return syscall(SYS_futex, &unused, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, nullptr, word, or_zero) >= 0 ||
         errno != EFAULT;
#else
  (void)memory;
  return true;
#endif
}

inline void require_writable(const Tensor& weight, const char* op, const char* name = "weight") {
  if (!weight.is_cpu() || weight.numel() == 0) return;
  require(is_writable(weight.mutable_data_ptr()), op, name,
          " is in read-only memory, such as a memmap of mode 'r', and this op writes to it: pass a copy, ", name,
          ".clone()");
}

}  // namespace s2ft
