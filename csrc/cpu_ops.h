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
#define MULTILORA_ABI_VERSION 1

// Element types, by the `dtype` arguments below.
enum { MULTILORA_F32 = 0, MULTILORA_BF16 = 1, MULTILORA_F16 = 2 };

MULTILORA_API int32_t multilora_abi_version(void);

// Sets logits[row, token] to -inf where bit `token % 32` of bitmask[row, token / 32] is 0.
MULTILORA_API void apply_token_mask(void* logits,            // dtype [rows, vocab]
                                    int64_t logits_stride,   // from row to row; along vocab it is 1
                                    int32_t dtype,           //
                                    const int32_t* bitmask,  // [rows, ceil(vocab / 32)]
                                    int64_t bitmask_stride,  // from row to row
                                    int64_t rows,            //
                                    int64_t vocab,           //
                                    int32_t num_threads);
