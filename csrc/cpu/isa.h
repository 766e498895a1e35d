#pragma once

#include <vector>

namespace slimvit {

// Instruction sets that kernels are written for, of a processor slowest first.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx, neon, neon_bf16 };

const char* name(Isa isa);

// What this processor and its operating system offer, slowest first; never empty.
std::vector<Isa> offered();

// The set that kernels use: the fastest offered that is not emulated, or the one that the
// environment variable SLIMVIT_ISA names. Throws std::invalid_argument if that one is unknown or
// not offered.
Isa chosen();

}  // namespace slimvit
