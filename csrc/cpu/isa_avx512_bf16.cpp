#include "cpu/instruction_set.h"
#include "cpu/vec_avx512.h"

SLIMVIT_KERNELS(avx512_bf16, Avx512Bf16)
