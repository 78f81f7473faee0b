// The kernels for whatever the compiler's default instruction set is.

#include <cmath>
#include <vector>

#include "args.h"
#include "cpu_ops.h"
#include "vec.h"

namespace generic {
#include "kernels.inc"
}
