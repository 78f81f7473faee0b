// The kernels for whatever the compiler's default instruction set is.

#include "args.h"
#include "cpu_ops.h"

#define MULTILORA_LANES 8
#include "vec.h"

namespace generic {
#include "kernels.inc"
}
