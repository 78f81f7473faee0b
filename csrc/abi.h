// The whole C ABI of multilora's CPU library: pointers and sizes, no torch, no Python.
//
// kernels/cpu/native.py repeats every signature and structure, and a test compares the two. Strides
// are in elements. The caller has checked shapes, dtypes and devices; nothing here checks them
// again. What the numbers inside of index arrays may name is checked here, before anything else is
// read or written: a function that returns an int32_t returns one of the codes below. `num_threads`
// is the framework's own setting, at least 1; small jobs take one thread.

#pragma once

#include <stdint.h>

#define MULTILORA_API extern "C" __attribute__((visibility("default")))

// Raised whenever a function below changes its meaning or its arguments. The loader ignores a
// library that says another number than kernels/cpu/native.py.
#define MULTILORA_ABI_VERSION 14

// Element types, by the `dtype` arguments below; int8 of KV pages and packed weights, int4 of
// packed weights alone.
enum {
    MULTILORA_F32 = 0,
    MULTILORA_BF16 = 1,
    MULTILORA_F16 = 2,
    MULTILORA_I8 = 3,
    MULTILORA_I4 = 4
};

// Which index array has a number out of range.
enum {
    MULTILORA_OK = 0,
    MULTILORA_BAD_TILES = 1,    // their number or order, a slot not in the table, rows outside of y
    MULTILORA_BAD_PAGES = 2,    // a slot's count, page id or scale row, or a row of changes
    MULTILORA_BAD_IDS = 3,      // a token id outside of the vocabulary
    MULTILORA_BAD_QUERIES = 4,  // query_starts that fall, or leave q
    MULTILORA_BAD_LENGTHS = 5,  // a sequence shorter than its queries or longer than its blocks
    MULTILORA_BAD_BLOCKS = 6,   // a block id outside of the cache
    MULTILORA_BAD_POSITIONS = 7,  // a position outside of the tables of cos and sin
    MULTILORA_BAD_SLOTS = 8,      // a KV slot outside of the cache
};

// Instruction sets, from the least to the most capable.
enum { MULTILORA_GENERIC = 0, MULTILORA_AVX2 = 1, MULTILORA_AVX512 = 2, MULTILORA_AVX512_BF16 = 3 };

MULTILORA_API int32_t multilora_abi_version(void);

// Uses the best instruction set of this machine that is not above `most`; says which. Results have
// the same bits only within one instruction set. Not to be called while a kernel runs.
MULTILORA_API void select_isa(int32_t most, int32_t* chosen);

// Low-rank deltas: see lora_ and lora_embed_ in kernels/reference.py. A page's own [slices, 8, in]
// or [8, out] is dense. Types: f32, bf16 or f16.
struct LoraArgs {
    void* y;                      // dtype [tokens, out], changed in place
    const void* x;                // dtype [tokens, in]; null where there are ids
    const int64_t* ids;           // [tokens] for an embedding, whose A pages are [in, 8]; or null
    int64_t y_stride;             // from row to row
    int64_t x_stride;             // from row to row
    int64_t tokens;               //
    int64_t in_;                  // columns of x, or the vocabulary
    int64_t out;                  //
    const void* a;                // page_dtype [pages, slices, 8, in]
    const void* b;                // page_dtype [pages, 8, out]
    int64_t a_stride;             // from page to page
    int64_t b_stride;             // from page to page
    int64_t pages;                //
    const int64_t* slice_starts;  // [slices + 1]
    int64_t slices;               //
    const int32_t* page_ids;      // [slots, max_pages]
    const float* page_weights;    // [slots, max_pages]
    const int32_t* num_pages;     // [slots]
    const int32_t* scale_row;     // [slots], or null
    const void* scale;            // scale_dtype [scale_rows, out], or null
    const void* bias;             // scale_dtype [scale_rows, out], or null
    int64_t slots;                //
    int64_t max_pages;            //
    int64_t table_stride;         // of page_ids and page_weights, from slot to slot
    int64_t scale_rows;           //
    const int32_t* tile_slots;    // [num_tiles]
    const int32_t* tile_starts;   // [num_tiles], first row
    const int32_t* tile_lens;     // [num_tiles], rows
    const int32_t* num_tiles;     // [1], how many of them are real
    int64_t tiles;                // how many there is room for
    int32_t dtype;                // of x and y
    int32_t page_dtype;           // of a and b
    int32_t scale_dtype;          // of scale and bias
    int32_t num_threads;          //
};
MULTILORA_API int32_t lora(const LoraArgs* args);

// Trained columns of a linear: see lora_columns_ in kernels/reference.py.
struct ColumnsArgs {
    void* y;                     // dtype [tokens, out], changed in place
    const void* x;               // dtype [tokens, in]
    int64_t y_stride;            // from row to row
    int64_t x_stride;            // from row to row
    int64_t tokens;              //
    int64_t in_;                 //
    int64_t out;                 //
    const int32_t* column_ids;   // [slots, max_columns]
    const int32_t* num_columns;  // [slots]
    const void* weights;         // weights_dtype [slots, max_columns, in]
    int64_t slots;               //
    int64_t max_columns;         // a multiple of 8
    int64_t weights_stride;      // from slot to slot
    const int32_t* tile_slots;   // [num_tiles]
    const int32_t* tile_starts;  // [num_tiles], first row
    const int32_t* tile_lens;    // [num_tiles]
    const int32_t* num_tiles;    // [1]
    int64_t tiles;               // capacity
    int32_t dtype;               //
    int32_t weights_dtype;       //
    int32_t num_threads;         //
};
MULTILORA_API int32_t lora_columns(const ColumnsArgs* args);

// Causal attention over KV pages: see paged_attention in kernels/reference.py.
struct AttentionArgs {
    void* out;                    // dtype [tokens, heads, head_dim]; rows of no sequence become 0
    const void* q;                // dtype [tokens, heads, head_dim]
    int64_t q_stride;             // from token to token
    const void* k;                // kv_dtype [blocks, block_size, kv_heads, head_dim]
    const void* v;                // laid out like k
    int64_t block_stride;         //
    int64_t token_stride;         // within a block
    const float* k_scale;         // [kv_heads], or null
    const float* v_scale;         // [kv_heads], or null
    const int32_t* block_table;   // [seqs, max_blocks]
    const int32_t* seq_lens;      // [seqs]
    const int32_t* query_starts;  // [seqs + 1]
    int64_t tokens;               //
    int64_t seqs;                 //
    int64_t heads;                //
    int64_t kv_heads;             //
    int64_t head_dim;             //
    int64_t blocks;               //
    int64_t block_size;           //
    int64_t max_blocks;           //
    float scale;                  //
    int32_t dtype;                // of q and out: f32, bf16 or f16
    int32_t kv_dtype;             // of k and v: those or int8
    int32_t num_threads;          //
};
MULTILORA_API int32_t paged_attention(const AttentionArgs* args);

// silu(gate) * up of x = [gate | up]; silu is rounded to the type before the product.
struct SiluArgs {
    void* out;            // dtype [tokens, inter]
    const void* x;        // dtype [tokens, 2 * inter]
    int64_t x_stride;     //
    int64_t tokens;       //
    int64_t inter;        //
    int32_t dtype;        // f32, bf16 or f16
    int32_t num_threads;  //
};
MULTILORA_API void silu_mul(const SiluArgs* args);

// RMS norm; with a residual it becomes residual + x first and is what is normalised.
struct NormArgs {
    void* out;                  // dtype [tokens, hidden]
    const void* x;              // dtype [tokens, hidden]
    void* residual;             // dtype [tokens, hidden], or null
    const void* weight;         // dtype [hidden]
    const float* change;        // [change_rows, hidden], added to the weight of a token; or null
    const int32_t* change_row;  // [tokens], -1 = none; null with it
    int64_t x_stride;           //
    int64_t residual_stride;    //
    int64_t change_stride;      // from row to row
    int64_t change_rows;        //
    int64_t tokens;             //
    int64_t hidden;             //
    float eps;                  //
    int32_t dtype;              // f32, bf16 or f16
    int32_t num_threads;        //
};
MULTILORA_API int32_t rms_norm(const NormArgs* args);

// Rotates q in place, stores rotated k and plain v in their pages; slot -1 stores nothing.
struct RopeArgs {
    void* q;                   // dtype [tokens, heads, head_dim]
    const void* k;             // dtype [tokens, kv_heads, head_dim]
    const void* v;             // laid out like k
    int64_t q_stride;          // from token to token
    int64_t kv_stride;         // of k and v
    const float* cos;          // [max_position, head_dim / 2]
    const float* sin;          // laid out like cos
    const int64_t* positions;  // [tokens]
    const int64_t* kv_slots;   // [tokens]
    void* k_blocks;            // dtype [blocks, block_size, kv_heads, head_dim]
    void* v_blocks;            // laid out like k_blocks
    int64_t block_stride;      //
    int64_t token_stride;      //
    int64_t tokens;            //
    int64_t heads;             //
    int64_t kv_heads;          //
    int64_t head_dim;          //
    int64_t max_position;      //
    int64_t blocks;            //
    int64_t block_size;        //
    int32_t dtype;             // f32, bf16 or f16
    int32_t num_threads;       //
};
MULTILORA_API int32_t rope_store_kv(const RopeArgs* args);

// y = x W^T + bias with W packed as linear_panel.inc and kernels/cpu/panels.py say. Sums are f32; a
// row's bits do not depend on the other rows.
struct LinearArgs {
    void* y;              // dtype [rows, out]
    const void* x;        // dtype [rows, in]
    const void* packed;   // of `kind`
    const float* scales;  // [ceil(in / group), panels * 32], or null
    const void* bias;     // dtype [out], or null
    int64_t y_stride;     //
    int64_t x_stride;     //
    int64_t group;        // inputs that share a scale: 32, 64, 128 or in
    int64_t rows;         //
    int64_t in_;          //
    int64_t out;          //
    int32_t dtype;        // f32, bf16 or f16
    int32_t kind;         // f32, bf16, f16, i8 or i4
    int32_t num_threads;  //
};
MULTILORA_API void linear(const LinearArgs* args);

// Sets logits[row, token] to -inf where bit `token % 32` of mask[row, token / 32] is 0.
struct MaskArgs {
    void* logits;           // dtype [rows, vocab]
    const int32_t* mask;    // [rows, ceil(vocab / 32)]
    int64_t logits_stride;  // from row to row
    int64_t mask_stride;    // from row to row
    int64_t rows;           //
    int64_t vocab;          //
    int32_t dtype;          // f32, bf16 or f16
    int32_t num_threads;    //
};
MULTILORA_API void apply_token_mask(const MaskArgs* args);

// The target and the `top` likeliest tokens of each row, their log probabilities and ranks.
struct TopArgs {
    const void* logits;      // dtype [rows, vocab]
    const int64_t* targets;  // [rows]
    int64_t* ids;            // [rows, 1 + top]
    float* logprobs;         // [rows, 1 + top]
    int64_t* ranks;          // [rows, 1 + top]
    int64_t logits_stride;   // from row to row
    int64_t rows;            //
    int64_t vocab;           //
    int64_t top;             // at most MULTILORA_MOST_TOP and vocab
    int32_t dtype;           // f32, bf16 or f16
    int32_t num_threads;     //
};
#define MULTILORA_MOST_TOP 256
MULTILORA_API int32_t top_logprobs(const TopArgs* args);

// A random token of each row: see draw in kernels/reference.py.
struct DrawArgs {
    int64_t* tokens;           // [rows], 0 where it failed
    uint8_t* failed;           // [rows], 0 or 1
    const void* logits;        // dtype [rows, vocab]
    const float* temperature;  // [rows], above 0
    const int64_t* top_k;      // [rows]; from vocab on it keeps all
    const double* top_p;       // [rows]; from 1 on it keeps all
    const double* log_min_p;   // [rows]
    const int64_t* numbers;    // [rows], of 53 random bits
    int64_t logits_stride;     // from row to row
    int64_t rows;              //
    int64_t vocab;             // at least 1
    int32_t dtype;             // f32, bf16 or f16
    int32_t num_threads;       //
};
MULTILORA_API void draw(const DrawArgs* args);

// Calls of the functions above, kept to be made again on what their memory holds by then.
enum {
    MULTILORA_CALL_LORA = 0,
    MULTILORA_CALL_ATTENTION = 1,
    MULTILORA_CALL_SILU = 2,
    MULTILORA_CALL_NORM = 3,
    MULTILORA_CALL_ROPE = 4,
    MULTILORA_CALL_LINEAR = 5,
    MULTILORA_CALL_COLUMNS = 6,
};
struct CallArgs {
    const void* args;  // of the function that `kind` names
    int64_t kind;      // MULTILORA_CALL_...
};
// Makes them in order, with `num_threads` instead of their own, until one returns another code than
// MULTILORA_OK: that code. `seconds`, if not null, gets what each took.
MULTILORA_API int32_t run_calls(const CallArgs* calls, int64_t count, int32_t num_threads,
                                double* seconds);
