// Linears for AVX-512 with bf16 dot products, chosen at run time (dispatch.cpp).

#include "kernel_table.h"
#include "abi.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
// g++ 12 says this of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define MULTILORA_LANES 16
#define MULTILORA_INTRINSICS
#include "vec.h"

namespace avx512_bf16 {
namespace {
#include "linear.inc"
#include "linear_bf16.inc"
}  // namespace

void linear(const LinearArgs& g) {
    if (g.dtype == MULTILORA_BF16) {
        if (g.kind == MULTILORA_BF16) return linear_of<bf16, DotBf16>(g);
        if (g.kind == MULTILORA_I8) return linear_of<bf16, DotInt8>(g);
        if (g.kind == MULTILORA_I4) return linear_of<bf16, DotInt4>(g);
    }
    avx512::kTable.linear(g);
}
}  // namespace avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
