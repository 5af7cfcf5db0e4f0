// Functions that are compiled several times. When the module is loaded, the version for the processor is chosen.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define S2FT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2FT_CLONES
#endif

// A function that a clone calls must be inlined, so that it is compiled for the same processor.
#if defined(__GNUC__)
#define S2FT_INLINE inline __attribute__((always_inline))
#else
#define S2FT_INLINE inline
#endif

// The build forbids fused multiply-add, because base + alpha * delta must be rounded as in PyTorch. This allows it
// again for functions that need not be that exact. Without it, polynomials take up to 1.5 times as long.
#if defined(__GNUC__) && !defined(__clang__)
#define S2FT_FUSED __attribute__((optimize("fp-contract=fast")))
#else
#define S2FT_FUSED
#endif

// Promises that the next loop reads no element that an earlier iteration wrote. Without it, the compiler does not
// vectorise a loop whose two spans may be the same.
#if defined(__GNUC__) && !defined(__clang__)
#define S2FT_INDEPENDENT _Pragma("GCC ivdep")
#else
#define S2FT_INDEPENDENT
#endif
