// Linears for AVX-512 with bf16 dot products, chosen at run time (dispatch.cpp).

#include "args.h"
#include "cpu_ops.h"

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
#include "panel.inc"
#include "dot.inc"
#include "gemm.inc"
}  // namespace

void gemm(const GemmArgs& g) {
    if (g.dtype == MULTILORA_BF16) {
        if (g.kind == MULTILORA_BF16) return gemm_of<bf16, DotBf16>(g);
        if (g.kind == MULTILORA_I8) return gemm_of<bf16, DotInt8>(g);
        if (g.kind == MULTILORA_I4) return gemm_of<bf16, DotInt4>(g);
    }
    avx512::kKernels.gemm(g);
}
}  // namespace avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
