// Functions compiled several times and picked when the module loads, by what the processor has.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define S2FT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2FT_CLONES
#endif

// What a clone calls must be inlined to be compiled with it.
#if defined(__GNUC__)
#define S2FT_INLINE inline __attribute__((always_inline))
#else
#define S2FT_INLINE inline
#endif

// The build forbids fused products and sums, since base + alpha * delta must be rounded as PyTorch rounds it. For
// what need not be that exact they are allowed again: without them polynomials take up to half as long again.
#if defined(__GNUC__) && !defined(__clang__)
#define S2FT_FUSED __attribute__((optimize("fp-contract=fast")))
#else
#define S2FT_FUSED
#endif

// The loop below reads no element that an earlier round of it wrote: a compiler that finds that two spans
// may be one must not give up vectors for it.
#if defined(__GNUC__) && !defined(__clang__)
#define S2FT_INDEPENDENT _Pragma("GCC ivdep")
#else
#define S2FT_INDEPENDENT
#endif
