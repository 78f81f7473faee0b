#include "cpu_ops.h"

int32_t multilora_abi_version(void) { return MULTILORA_ABI_VERSION; }
