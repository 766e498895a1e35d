#pragma once

#include "cpu/numbers.h"

#ifdef SLIMVIT_EMULATED_AMX
#include "amx_emulated.h"
#endif

// The eight tiles of AMX, each up to 16 rows of 64 bytes. By hand, because compilers' own headers
// do not say that a tile load reads memory.

namespace slimvit {
namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};  // of a row, by tile
  std::uint8_t rows[16] = {};
};

#ifndef SLIMVIT_EMULATED_AMX

struct Tiles {
  static SLIMVIT_INLINE void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static SLIMVIT_INLINE void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static SLIMVIT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static SLIMVIT_INLINE void load(const void* from, long row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static SLIMVIT_INLINE void store(void* to, long row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(kTile) : "memory");
  }
  // Sum [rows, 16] += A [rows, pairs] · B [pairs, 16], float32 of pairs of bfloat16.
  template <int kSum, int kA, int kB>
  static SLIMVIT_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

#endif

}  // namespace
}  // namespace slimvit
