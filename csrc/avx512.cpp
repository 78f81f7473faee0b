// The kernels for AVX-512 (F, BW, VL, DQ), chosen at run time (dispatch.cpp).

#include "kernel_table.h"
#include "abi.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
// g++ 12 says this of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define MULTILORA_LANES 16
#define MULTILORA_INTRINSICS
#include "vec.h"

namespace avx512 {
#include "kernel_table.inc"
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
