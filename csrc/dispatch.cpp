// The C entries of the kernels: each goes to the best instruction set that this machine has.

#include "args.h"
#include "cpu_ops.h"

namespace {

int32_t best_isa() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return MULTILORA_AVX512;
    }
    if (avx2) return MULTILORA_AVX2;
#endif
    return MULTILORA_GENERIC;
}

const Kernels* table_of(int32_t isa) {
#if defined(__x86_64__)
    if (isa == MULTILORA_AVX512) return &avx512::kKernels;
    if (isa == MULTILORA_AVX2) return &avx2::kKernels;
#endif
    (void)isa;
    return &generic::kKernels;
}

const Kernels* kernels = table_of(best_isa());

}  // namespace

void select_isa(int32_t most, int32_t* chosen) {
    const int32_t best = best_isa();
    *chosen = most < best ? most : best;
    kernels = table_of(*chosen);
}

void lora(void* y, int64_t y_stride, const void* x, int64_t x_stride, int32_t dtype, const void* a,
          int64_t a_stride, const void* b, int64_t b_stride, int32_t page_dtype,
          const int32_t* page_ids, const float* page_weights, const int32_t* num_pages,
          int64_t table_stride, const int32_t* tile_slots, const int32_t* tile_starts,
          const int32_t* tile_lens, int64_t num_tiles, float* planes, int64_t max_pages,
          const int64_t* slice_starts, int64_t slices, int64_t in, int64_t out,
          int32_t num_threads) {
    const LoraArgs args{
        y,          y_stride,    x,          x_stride,   dtype,        a,         a_stride,
        b,          b_stride,    page_dtype, page_ids,   page_weights, num_pages, table_stride,
        tile_slots, tile_starts, tile_lens,  num_tiles,  planes,       max_pages, slice_starts,
        slices,     in,          out,        num_threads};
kernels->lora(args);
}

void paged_attention(void* out, const void* q, int64_t q_stride, int32_t dtype, const void* k,
                     const void* v, int64_t block_stride, int64_t token_stride,
                     const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens,
                     const int32_t* query_starts, int64_t seqs, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, int64_t block_size, float scale, int32_t num_threads) {
    const AttentionArgs args{out,
                             q,
                             q_stride,
                             dtype,
                             k,
                             v,
                             block_stride,
                             token_stride,
                             block_table,
                             table_stride,
                             seq_lens,
                             query_starts,
                             seqs,
                             heads,
                             kv_heads,
                             head_dim,
                             block_size,
                             scale,
                             num_threads};
kernels->attention(args);
}

void silu_mul(void* out, const void* x, int64_t x_stride, int32_t dtype, int64_t tokens,
              int64_t inter, int32_t num_threads) {
    const SiluArgs args{out, x, x_stride, dtype, tokens, inter, num_threads};
kernels->silu(args);
}

void rms_norm(void* out, const void* x, int64_t x_stride, void* residual, int64_t residual_stride,
              const void* weight, int32_t dtype, int64_t tokens, int64_t hidden, float eps,
              int32_t num_threads) {
    const NormArgs args{out,   x,      x_stride, residual, residual_stride, weight,
                        dtype, tokens, hidden,   eps,      num_threads};
kernels->norm(args);
}

void rope_store_kv(void* q, const void* k, const void* v, int64_t stride, int32_t dtype,
                   const float* cos, const float* sin, const int64_t* positions,
                   const int64_t* kv_slots, void* k_blocks, void* v_blocks, int64_t block_stride,
                   int64_t token_stride, int64_t tokens, int64_t heads, int64_t kv_heads,
                   int64_t head_dim, int64_t block_size, int32_t num_threads) {
    const RopeArgs args{
        q,         k,        v,        stride,     dtype,        cos,          sin,
        positions, kv_slots, k_blocks, v_blocks,   block_stride, token_stride, tokens,
        heads,     kv_heads, head_dim, block_size, num_threads};
kernels->rope(args);
}

void gemm(void* y, int64_t y_stride, const void* x, int64_t x_stride, int32_t dtype,
          const void* packed, int32_t kind, const float* scales, int64_t group, const void* bias,
          int64_t rows, int64_t in, int64_t out, int32_t num_threads) {
    const GemmArgs args{y,      y_stride, x,    x_stride, dtype, packed, kind,
                        scales, group,    bias, rows,     in,    out,    num_threads};
    kernels->gemm(args);
}
