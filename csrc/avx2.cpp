// The kernels for AVX2 with FMA, chosen at run time (dispatch.cpp).

#include <cmath>
#include <vector>

#include "args.h"
#include "cpu_ops.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "vec.h"

namespace avx2 {
#include "kernels.inc"
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
