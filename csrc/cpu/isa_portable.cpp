#include "cpu/vec_portable.h"

#include "cpu/instruction_set.h"

SLIMVIT_KERNELS(portable, Portable)
