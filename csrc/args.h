// The kernels as one table for each instruction set; dispatch.cpp takes the best that the machine
// has.

#pragma once

#include "cpu_ops.h"

struct Kernels {
    void (*lora)(const LoraArgs&);
    void (*attention)(const AttentionArgs&);
    void (*silu)(const SiluArgs&);
    void (*norm)(const NormArgs&);
    void (*rope)(const RopeArgs&);
    void (*gemm)(const GemmArgs&);
    void (*top)(const TopArgs&);
    void (*draw)(const DrawArgs&);
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
namespace avx512_bf16 {
void gemm(const GemmArgs&);  // the rest is avx512's
}
