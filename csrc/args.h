// The arguments of the larger kernels, as structs: their meaning is in cpu_ops.h.

#pragma once

#include <cstdint>

struct LoraArgs {
    void* y;
    int64_t y_stride;
    const void* x;
    int64_t x_stride;
    int32_t dtype;
    const void* a;
    int64_t a_stride;
    const void* b;
    int64_t b_stride;
    int32_t page_dtype;
    const int32_t* page_ids;
    const float* page_weights;
    const int32_t* num_pages;
    int64_t table_stride;
    const int32_t *tile_slots, *tile_starts, *tile_lens;
    int64_t num_tiles;
    float* planes;
    int64_t max_pages;
    const int64_t* slice_starts;
    int64_t slices, in, out;
    int32_t num_threads;
};

struct AttentionArgs {
    void* out;
    const void* q;
    int64_t q_stride;
    int32_t dtype;
    const void *k, *v;
    int64_t block_stride, token_stride;
    const int32_t* block_table;
    int64_t table_stride;
    const int32_t *seq_lens, *query_starts;
    int64_t seqs, heads, kv_heads, head_dim, block_size;
    float scale;
    int32_t num_threads;
};

struct SiluArgs {
    void* out;
    const void* x;
    int64_t x_stride;
    int32_t dtype;
    int64_t tokens, inter;
    int32_t num_threads;
};

struct NormArgs {
    void* out;
    const void* x;
    int64_t x_stride;
    void* residual;
    int64_t residual_stride;
    const void* weight;
    int32_t dtype;
    int64_t tokens, hidden;
    float eps;
    int32_t num_threads;
};

struct RopeArgs {
    void* q;
    const void *k, *v;
    int64_t stride;
    int32_t dtype;
    const float *cos, *sin;
    const int64_t *positions, *kv_slots;
    void *k_blocks, *v_blocks;
    int64_t block_stride, token_stride;
    int64_t tokens, heads, kv_heads, head_dim, block_size;
    int32_t num_threads;
};

struct GemmArgs {
    void* y;
    int64_t y_stride;
    const void* x;
    int64_t x_stride;
    int32_t dtype;
    const void* packed;
    int32_t kind;
    const float* scales;
    int64_t group;
    const void* bias;
    int64_t rows, in, out;
    int32_t num_threads;
};

// One table for each instruction set; dispatch.cpp takes the best that the machine has.
struct Kernels {
    void (*lora)(const LoraArgs&);
    void (*attention)(const AttentionArgs&);
    void (*silu)(const SiluArgs&);
    void (*norm)(const NormArgs&);
    void (*rope)(const RopeArgs&);
    void (*gemm)(const GemmArgs&);
};

namespace generic {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
