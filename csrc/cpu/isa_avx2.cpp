#include "cpu/instruction_set.h"
#include "cpu/vec_avx2.h"

SLIMVIT_KERNELS(avx2, Avx2)
