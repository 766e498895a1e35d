#include "cpu/kernels.h"

#include <sched.h>

#include <stdexcept>
#include <string>

#include "cpu/stopwatch.h"

namespace slimvit {

extern const Kernels portable_float32, portable_bfloat16;
#if defined(__x86_64__)
extern const Kernels avx2_float32, avx2_bfloat16, avx512_float32, avx512_bfloat16;
extern const Kernels avx512_bf16_float32, avx512_bf16_bfloat16, amx_bfloat16;
#elif defined(__aarch64__)
extern const Kernels neon_float32, neon_bfloat16, neon_bf16_float32, neon_bf16_bfloat16;
#endif

const Kernels& kernels(Isa isa, Dtype dtype) {
  const bool wide = dtype == Dtype::float32;
  switch (isa) {
    case Isa::portable:
      return wide ? portable_float32 : portable_bfloat16;
#if defined(__x86_64__)
    case Isa::avx2:
      return wide ? avx2_float32 : avx2_bfloat16;
    case Isa::avx512:
      return wide ? avx512_float32 : avx512_bfloat16;
    case Isa::avx512_bf16:
      return wide ? avx512_bf16_float32 : avx512_bf16_bfloat16;
    case Isa::amx:  // whose tiles multiply bfloat16 alone
      return wide ? avx512_float32 : amx_bfloat16;
#elif defined(__aarch64__)
    case Isa::neon:
      return wide ? neon_float32 : neon_bfloat16;
    case Isa::neon_bf16:
      return wide ? neon_bf16_float32 : neon_bf16_bfloat16;
#endif
    default:
      throw std::invalid_argument(std::string("slimvit was built without kernels for ") +
                                  name(isa));
  }
}

void Barrier::wait() {
  const Stopwatch stopwatch(Phase::waiting);
  constexpr int kSpins = 20000;  // about 0.5 ms; then other threads may need the processor
  const unsigned generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size_) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
    if (spins >= kSpins) sched_yield();
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#elif defined(__aarch64__)
    else
      asm volatile("yield");
#endif
  }
}

}  // namespace slimvit
