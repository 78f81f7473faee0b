// The kernels for whatever the compiler's default instruction set is.

#include "kernel_table.h"
#include "abi.h"

#define MULTILORA_LANES 8
#include "vec.h"

namespace generic {
#include "kernel_table.inc"
}
