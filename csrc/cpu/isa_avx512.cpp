#include "cpu/instruction_set.h"
#include "cpu/vec_avx512.h"

SLIMVIT_KERNELS(avx512, Avx512)
