// The C entries of the kernels: each goes to the best instruction set that this machine has.

#include "abi.h"
#include "checks.h"
#include "kernel_table.h"

#include <time.h>

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

KernelTable table_of(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= MULTILORA_AVX512) {
        KernelTable table = avx512::kTable;
        if (isa == MULTILORA_AVX512_BF16) table.linear = avx512_bf16::linear;
        return table;
    }
    if (isa == MULTILORA_AVX2) return avx2::kTable;
#endif
    (void)isa;
    return generic::kTable;
}

KernelTable kernels = table_of(best_isa());

constexpr int64_t kSerial = 1 << 17;  // multiply-adds below which waking a thread costs more

template <typename Args>
int32_t run(void (*kernel)(const Args&), Args args) {
    const int32_t code = check(args);
    if (code != MULTILORA_OK) return code;
    if (work_of(args) < kSerial) args.num_threads = 1;
    kernel(args);
    return MULTILORA_OK;
}

template <typename Args>
int32_t run_with(void (*kernel)(const Args&), const void* from, int32_t num_threads) {
    Args args = *static_cast<const Args*>(from);
    args.num_threads = num_threads;
    return run(kernel, args);
}

int32_t run_call(const CallArgs& call, int32_t num_threads) {
    switch (call.kind) {
        case MULTILORA_CALL_LORA: return run_with(kernels.lora, call.args, num_threads);
        case MULTILORA_CALL_ATTENTION:
            return run_with(kernels.paged_attention, call.args, num_threads);
        case MULTILORA_CALL_SILU: return run_with(kernels.silu_mul, call.args, num_threads);
        case MULTILORA_CALL_NORM: return run_with(kernels.rms_norm, call.args, num_threads);
        case MULTILORA_CALL_ROPE: return run_with(kernels.rope_store_kv, call.args, num_threads);
        case MULTILORA_CALL_LINEAR: return run_with(kernels.linear, call.args, num_threads);
        default: return run_with(kernels.lora_columns, call.args, num_threads);
    }
}

double now() {  // s
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

int32_t multilora_abi_version(void) { return MULTILORA_ABI_VERSION; }

void select_isa(int32_t most, int32_t* chosen) {
    const int32_t best = best_isa();
    *chosen = most < MULTILORA_GENERIC ? MULTILORA_GENERIC : most < best ? most : best;
    kernels = table_of(*chosen);
}

int32_t lora(const LoraArgs* args) { return run(kernels.lora, *args); }

int32_t lora_columns(const ColumnsArgs* args) { return run(kernels.lora_columns, *args); }

int32_t paged_attention(const AttentionArgs* args) { return run(kernels.paged_attention, *args); }

int32_t rope_store_kv(const RopeArgs* args) { return run(kernels.rope_store_kv, *args); }

void silu_mul(const SiluArgs* args) { run(kernels.silu_mul, *args); }

int32_t rms_norm(const NormArgs* args) { return run(kernels.rms_norm, *args); }

void linear(const LinearArgs* args) { run(kernels.linear, *args); }

void apply_token_mask(const MaskArgs* args) { run(kernels.apply_token_mask, *args); }

int32_t top_logprobs(const TopArgs* args) { return run(kernels.top_logprobs, *args); }

void draw(const DrawArgs* args) { run(kernels.draw, *args); }

int32_t run_calls(const CallArgs* calls, int64_t count, int32_t num_threads, double* seconds) {
    for (int64_t i = 0; i < count; ++i) {
        const double start = seconds == nullptr ? 0 : now();
        const int32_t code = run_call(calls[i], num_threads);
        if (code != MULTILORA_OK) return code;
        if (seconds != nullptr) seconds[i] = now() - start;
    }
    return MULTILORA_OK;
}
