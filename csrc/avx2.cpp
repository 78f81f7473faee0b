// The kernels for AVX2 with FMA and F16C, chosen at run time (dispatch.cpp).

#include "kernel_table.h"
#include "abi.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MULTILORA_LANES 8
#define MULTILORA_INTRINSICS
#include "vec.h"

namespace avx2 {
#include "kernel_table.inc"
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
