#include "cpu/vec_avx512.h"

#include "cpu/instruction_set.h"

SLIMVIT_KERNELS(avx512, Avx512)
