#include "cpu/instruction_set.h"
#include "cpu/vec_portable.h"

SLIMVIT_KERNELS(portable, Portable)
