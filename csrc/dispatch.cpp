// The C entries of the kernels: each goes to the best instruction set that this machine has.

#include "args.h"
#include "checks.h"
#include "cpu_ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
bool has_f16c() {  // clang 14 has no such name for __builtin_cpu_supports
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

int32_t best_isa() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return __builtin_cpu_supports("avx512bf16") ? MULTILORA_AVX512_BF16 : MULTILORA_AVX512;
    }
    if (avx2) return MULTILORA_AVX2;
#endif
    return MULTILORA_GENERIC;
}

Kernels table_of(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= MULTILORA_AVX512) {
        Kernels table = avx512::kKernels;
        if (isa == MULTILORA_AVX512_BF16) table.gemm = avx512_bf16::gemm;
        return table;
    }
    if (isa == MULTILORA_AVX2) return avx2::kKernels;
#endif
    (void)isa;
    return generic::kKernels;
}

Kernels kernels = table_of(best_isa());

constexpr int64_t kSerial = 1 << 17;  // multiply-adds below which waking a thread costs more

template <typename Args>
void run(void (*kernel)(const Args&), Args args) {
    if (work_of(args) < kSerial) args.num_threads = 1;
    kernel(args);
}

}  // namespace

void select_isa(int32_t most, int32_t* chosen) {
    const int32_t best = best_isa();
    *chosen = most < MULTILORA_GENERIC ? MULTILORA_GENERIC : most < best ? most : best;
    kernels = table_of(*chosen);
}

int32_t lora(const LoraArgs* args) {
    const int32_t code = check(*args);
    if (code == MULTILORA_OK) run(kernels.lora, *args);
    return code;
}

int32_t paged_attention(const AttentionArgs* args) {
    const int32_t code = check(*args);
    if (code == MULTILORA_OK) run(kernels.attention, *args);
    return code;
}

int32_t rope_store_kv(const RopeArgs* args) {
    const int32_t code = check(*args);
    if (code == MULTILORA_OK) run(kernels.rope, *args);
    return code;
}

void silu_mul(const SiluArgs* args) { run(kernels.silu, *args); }

void rms_norm(const NormArgs* args) { run(kernels.norm, *args); }

void gemm(const GemmArgs* args) { run(kernels.gemm, *args); }

int32_t top_logprobs(const TopArgs* args) {
    const int32_t code = check(*args);
    if (code == MULTILORA_OK) run(kernels.top, *args);
    return code;
}

void draw(const DrawArgs* args) { run(kernels.draw, *args); }
