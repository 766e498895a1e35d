#include "cpu/instruction_set.h"
#include "cpu/vec_amx.h"

namespace slimvit {
extern const Kernels amx_bfloat16;
const Kernels amx_bfloat16 = make_kernels<Amx, bf16>();
}  // namespace slimvit
