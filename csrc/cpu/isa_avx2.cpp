#include "cpu/vec_avx2.h"

#include "cpu/instruction_set.h"

SLIMVIT_KERNELS(avx2, Avx2)
