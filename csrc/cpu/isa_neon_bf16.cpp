#include "cpu/instruction_set.h"
#include "cpu/vec_neon.h"

SLIMVIT_KERNELS(neon_bf16, NeonBf16)
