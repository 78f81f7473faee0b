// The kernels as one table of functions for each instruction set. kernel_table.inc fills a table;
// dispatch.cpp takes that of the best set that the machine has.

#pragma once

#include "abi.h"

struct KernelTable {
    void (*lora)(const LoraArgs&);
    void (*lora_columns)(const ColumnsArgs&);
    void (*paged_attention)(const AttentionArgs&);
    void (*linear)(const LinearArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*silu_mul)(const SiluArgs&);
    void (*rope_store_kv)(const RopeArgs&);
    void (*apply_token_mask)(const MaskArgs&);
    void (*top_logprobs)(const TopArgs&);
    void (*draw)(const DrawArgs&);
};

namespace generic {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
void linear(const LinearArgs&);  // the rest is avx512's
}
