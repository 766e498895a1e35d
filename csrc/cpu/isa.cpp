#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace slimvit {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512,   Isa::avx512_bf16,
                        Isa::amx,      Isa::neon, Isa::neon_bf16};

#ifdef SLIMVIT_EMULATED_AMX
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

#if defined(__x86_64__)
// Linux saves the tiles only of processes that have asked for it, all threads at once.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

#if defined(__aarch64__)
bool multiplies_bfloat16() {
#if defined(__linux__)
  constexpr unsigned long kBfloat16 = 1ul << 14;
  return (getauxval(AT_HWCAP2) & kBfloat16) != 0;
#else
  return false;
#endif
}
#endif

// Each set includes the ones of its processor before it, so that a kernel may fall back on their
// instructions.
bool offers(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return offers(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return offers(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      if (kEmulated) return offers(Isa::avx512);
      return offers(Isa::avx512_bf16) && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#elif defined(__aarch64__)
    case Isa::neon:
      return true;
    case Isa::neon_bf16:
      return multiplies_bfloat16();
#endif
    default:
      return false;
  }
}

template <typename Sets>
std::string join(const Sets& sets) {
  std::string text;
  for (Isa isa : sets) text += (text.empty() ? "" : ", ") + std::string(name(isa));
  return text;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
    case Isa::neon:
      return "neon";
    case Isa::neon_bf16:
      return "neon_bf16";
  }
  return "unknown";
}

std::vector<Isa> offered() {
  std::vector<Isa> sets;
  for (Isa isa : kAll)
    if (offers(isa)) sets.push_back(isa);
  return sets;
}

Isa chosen() {
  const std::vector<Isa> here = offered();
  const char* forced = std::getenv("SLIMVIT_ISA");
  if (forced == nullptr || *forced == '\0')
    return kEmulated && here.back() == Isa::amx ? here.end()[-2] : here.back();
  for (Isa isa : kAll) {
    if (name(isa) != std::string(forced)) continue;
    if (offers(isa)) return isa;
    throw std::invalid_argument("SLIMVIT_ISA=" + std::string(forced) +
                                ": this processor offers only " + join(here));
  }
  throw std::invalid_argument("SLIMVIT_ISA must be one of " + join(kAll) + ", got '" + forced +
                              "'");
}

}  // namespace slimvit
