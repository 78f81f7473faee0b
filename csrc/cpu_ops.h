// The whole C ABI of multilora's CPU library: pointers and sizes, no torch, no Python.
//
// kernels/native.py repeats every signature in its table, and a test compares the two. Strides are
// in elements. The caller has checked shapes, dtypes and devices; nothing here checks them again.
// `num_threads` is passed in (the framework's own setting), at least 1.

#pragma once

#include <stdint.h>

#define MULTILORA_API extern "C" __attribute__((visibility("default")))

// Raised whenever a function below changes its meaning or its arguments. The loader ignores a
// library that says another number than kernels/native.py.
#define MULTILORA_ABI_VERSION 5

// Element types, by the `dtype` arguments below; int8 and int4 only of packed weights.
enum {
    MULTILORA_F32 = 0,
    MULTILORA_BF16 = 1,
    MULTILORA_F16 = 2,
    MULTILORA_INT8 = 3,
    MULTILORA_INT4 = 4
};

// Instruction sets, from the least to the most capable.
enum { MULTILORA_GENERIC = 0, MULTILORA_AVX2 = 1, MULTILORA_AVX512 = 2 };

MULTILORA_API int32_t multilora_abi_version(void);

// Uses the best instruction set of this machine that is not above `most`; says which. Results have
// the same bits only within one instruction set. Not to be called while a kernel runs.
MULTILORA_API void select_isa(int32_t most, int32_t* chosen);

// Sets logits[row, token] to -inf where bit `token % 32` of bitmask[row, token / 32] is 0.
MULTILORA_API void apply_token_mask(void* logits,            // dtype [rows, vocab]
                                    int64_t logits_stride,   // from row to row; along vocab it is 1
                                    int32_t dtype,           //
                                    const int32_t* bitmask,  // [rows, ceil(vocab / 32)]
                                    int64_t bitmask_stride,  // from row to row
                                    int64_t rows,            //
                                    int64_t vocab,           //
                                    int32_t num_threads);

// Adds to each row of y the low-rank delta of its tile's slot: see lora_ in kernels/reference.py.
// A page's own [slices, 8, in] or [8, out] is dense. Types: f32 or bf16. A tile has at most 64
// rows.
MULTILORA_API void lora(void* y,                      // dtype [tokens, out], changed in place
                        int64_t y_stride,             //
                        const void* x,                // dtype [tokens, in]
                        int64_t x_stride,             //
                        int32_t dtype,                //
                        const void* a,                // page_dtype [pages, slices, 8, in]
                        int64_t a_stride,             // from page to page
                        const void* b,                // page_dtype [pages, 8, out]
                        int64_t b_stride,             // from page to page
                        int32_t page_dtype,           //
                        const int32_t* page_ids,      // [slots, table_stride]
                        const float* page_weights,    // [slots, table_stride]
                        const int32_t* num_pages,     // [slots]
                        int64_t table_stride,         //
                        const int32_t* tile_slots,    // [num_tiles]
                        const int32_t* tile_starts,   // [num_tiles]
                        const int32_t* tile_lens,     // [num_tiles]
                        int64_t num_tiles,            //
                        float* planes,                // scratch [tokens, max_pages, slices, 8]
                        int64_t max_pages,            // most pages of any slot in the tiles
                        const int64_t* slice_starts,  // [slices + 1]
                        int64_t slices,               //
                        int64_t in,                   //
                        int64_t out,                  //
                        int32_t num_threads);

// Causal attention over KV pages: see paged_attention in kernels/reference.py. Types: f32 or bf16.
MULTILORA_API void paged_attention(void* out,         // dtype [tokens, heads, head_dim]
                                   const void* q,     // dtype [tokens, heads, head_dim]
                                   int64_t q_stride,  // from token to token
                                   int32_t dtype,     // of q, out, k and v
                                   const void* k,     // [blocks, block_size, kv_heads, head_dim]
                                   const void* v,     // laid out like k
                                   int64_t block_stride,         //
                                   int64_t token_stride,         // within a block
                                   const int32_t* block_table,   // [seqs, table_stride]
                                   int64_t table_stride,         //
                                   const int32_t* seq_lens,      // [seqs]
                                   const int32_t* query_starts,  // [seqs + 1]
                                   int64_t seqs,                 //
                                   int64_t heads,                //
                                   int64_t kv_heads,             //
                                   int64_t head_dim,             //
                                   int64_t block_size,           //
                                   float scale,                  //
                                   int32_t num_threads);

// silu(gate) * up of x = [gate | up]; silu is rounded to the type before the product.
MULTILORA_API void silu_mul(void* out,         // dtype [tokens, inter]
                            const void* x,     // dtype [tokens, 2 * inter]
                            int64_t x_stride,  //
                            int32_t dtype,     // f32 or bf16
                            int64_t tokens,    //
                            int64_t inter,     //
                            int32_t num_threads);

// RMS norm; with a residual it becomes residual + x first and is what is normalised.
MULTILORA_API void rms_norm(void* out,                // dtype [tokens, hidden]
                            const void* x,            // dtype [tokens, hidden]
                            int64_t x_stride,         //
                            void* residual,           // dtype [tokens, hidden], or null
                            int64_t residual_stride,  //
                            const void* weight,       // dtype [hidden]
                            int32_t dtype,            // f32 or bf16
                            int64_t tokens,           //
                            int64_t hidden,           //
                            float eps,                //
                            int32_t num_threads);

// Rotates q in place, stores rotated k and plain v in their pages; slot -1 stores nothing.
MULTILORA_API void rope_store_kv(void* q,                   // dtype [tokens, heads, head_dim]
                                 const void* k,             // dtype [tokens, kv_heads, head_dim]
                                 const void* v,             // laid out like k
                                 int64_t stride,            // from token to token, of all three
                                 int32_t dtype,             // f32 or bf16, of the pages too
                                 const float* cos,          // [positions, head_dim / 2]
                                 const float* sin,          // laid out like cos
                                 const int64_t* positions,  // [tokens]
                                 const int64_t* kv_slots,   // [tokens]
                                 void* k_blocks,        // [blocks, block_size, kv_heads, head_dim]
                                 void* v_blocks,        // laid out like k_blocks
                                 int64_t block_stride,  //
                                 int64_t token_stride,  //
                                 int64_t tokens,        //
                                 int64_t heads,         //
                                 int64_t kv_heads,      //
                                 int64_t head_dim,      //
                                 int64_t block_size,    //
                                 int32_t num_threads);

// y = x W^T + bias with W packed as csrc/gemm.inc and kernels/packed.py say. Sums are f32; a row's
// bits do not depend on the other rows.
MULTILORA_API void gemm(void* y,              // dtype [rows, out]
                        int64_t y_stride,     //
                        const void* x,        // dtype [rows, in]
                        int64_t x_stride,     //
                        int32_t dtype,        // f32, bf16 or f16
                        const void* packed,   // of `kind`
                        int32_t kind,         // f32, bf16, f16, int8 or int4
                        const float* scales,  // [ceil(in / group), panels * 32], or null
                        int64_t group,        // inputs that share a scale: 32, 64, 128 or in
                        const void* bias,     // dtype [out], or null
                        int64_t rows,         //
                        int64_t in,           //
                        int64_t out,          //
                        int32_t num_threads);
