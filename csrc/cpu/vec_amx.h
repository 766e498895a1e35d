#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/vec_avx512.h"

// Matrix products of bfloat16 in AMX tiles, everything else in 512-bit vectors.

namespace slimvit {
namespace {

#ifdef SLIMVIT_EMULATED_AMX
using AmxVectors = Avx512;
#else
using AmxVectors = Avx512Bf16;
#endif

struct Amx : AmxVectors {
  static constexpr Isa kIsa = Isa::amx;
  static constexpr int kTileRows = 16;
  static constexpr long kTileSteps = 16;  // pairs of k in a row of a tile
  static constexpr int kVecs = 2;         // tiles across
  static constexpr int kValueVecs = 2;
  static constexpr int rows(int) { return 2 * kTileRows; }

  // Sums in tiles 0 to 3, two by two; rows of `a` in 4 and 5, columns in 6 and 7.
  static void configure(int rows) {
    static thread_local int configured = 0;
    if (rows == 0) Tiles::release();
    if (rows == configured) return;
    configured = rows;
    if (rows == 0) return;
    TileConfig config;
    const int above = rows < kTileRows ? rows : kTileRows;
    const auto shape = [&](int tile, int tile_rows) {
      config.rows[tile] = static_cast<std::uint8_t>(tile_rows);
      config.bytes[tile] = tile_rows > 0 ? 64 : 0;
    };
    for (int tile : {0, 1, 4}) shape(tile, above);
    for (int tile : {2, 3, 5}) shape(tile, rows - above);
    for (int tile : {6, 7}) shape(tile, kTileRows);
    Tiles::configure(config);
  }
  static void finish() { configure(0); }

  static double peak(long rounds) {
    alignas(64) float sums[4 * kTileRows * kLanes];
    alignas(64) const bf16 zeros[2 * kTileRows * 2 * kTileSteps] = {};
    configure(2 * kTileRows);
    clear<2, 2>();
    step<2, 2>(zeros, 2 * kTileSteps, zeros);
    for (long r = 0; r < rounds; ++r) {
      Tiles::dot<0, 4, 6>();
      Tiles::dot<1, 4, 7>();
      Tiles::dot<2, 5, 6>();
      Tiles::dot<3, 5, 7>();
    }
    Tiles::store<0>(sums, kLanes * sizeof(float));
    return 4.0 * 2.0 * kTileRows * kLanes * 2 * kTileSteps * static_cast<double>(rounds) + sums[0];
  }

  // sums [rows, NV · 16] = a [rows, 2 · steps] · b [steps, NV · 16, 2], as configured for `rows`.
  template <int NV>
  static void multiply(int rows, const bf16* a, long lda, const bf16* b, long steps, float* sums) {
    if (rows > kTileRows)
      multiply<2, NV>(rows, a, lda, b, steps, sums);
    else
      multiply<1, NV>(rows, a, lda, b, steps, sums);
  }

 private:
  template <int MT, int NV>
  static void multiply(int rows, const bf16* a, long lda, const bf16* b, long steps, float* sums) {
    clear<MT, NV>();
    for (; steps >= kTileSteps; steps -= kTileSteps) {
      step<MT, NV>(a, lda, b);
      a += 2 * kTileSteps;
      b += 2 * kTileSteps * NV * kLanes;
    }
    if (steps > 0) {  // what is left, and zeros
      alignas(64) bf16 some_a[2 * kTileRows * 2 * kTileSteps], some_b[2 * kTileSteps * NV * kLanes];
      const auto left = static_cast<__mmask16>((1u << steps) - 1);
      for (int i = 0; i < rows; ++i)
        _mm512_store_si512(some_a + i * 2 * kTileSteps,
                           _mm512_maskz_loadu_epi32(left, a + i * lda));
      for (long i = 0; i < kTileSteps * NV; ++i)
        _mm512_store_si512(some_b + i * 2 * kLanes, i < steps * NV
                                                        ? _mm512_loadu_si512(b + i * 2 * kLanes)
                                                        : _mm512_setzero_si512());
      step<MT, NV>(some_a, 2 * kTileSteps, some_b);
    }
    constexpr long kRowBytes = NV * kLanes * sizeof(float);
    Tiles::store<0>(sums, kRowBytes);
    if constexpr (NV > 1) Tiles::store<1>(sums + kLanes, kRowBytes);
    if constexpr (MT > 1) {
      float* below = sums + kTileRows * NV * kLanes;
      Tiles::store<2>(below, kRowBytes);
      if constexpr (NV > 1) Tiles::store<3>(below + kLanes, kRowBytes);
    }
  }

  template <int MT, int NV>
  static SLIMVIT_INLINE void clear() {
    Tiles::zero<0>();
    if constexpr (NV > 1) Tiles::zero<1>();
    if constexpr (MT > 1) Tiles::zero<2>();
    if constexpr (MT > 1 && NV > 1) Tiles::zero<3>();
  }

  template <int MT, int NV>
  static SLIMVIT_INLINE void step(const bf16* a, long lda, const bf16* b) {
    constexpr long kColumnBytes = NV * kLanes * 2 * sizeof(bf16);
    const long row_bytes = lda * static_cast<long>(sizeof(bf16));
    Tiles::load<6>(b, kColumnBytes);
    Tiles::load<4>(a, row_bytes);
    Tiles::dot<0, 4, 6>();
    if constexpr (NV > 1) {
      Tiles::load<7>(b + 2 * kLanes, kColumnBytes);
      Tiles::dot<1, 4, 7>();
    }
    if constexpr (MT > 1) {
      Tiles::load<5>(a + kTileRows * lda, row_bytes);
      Tiles::dot<2, 5, 6>();
      if constexpr (NV > 1) Tiles::dot<3, 5, 7>();
    }
  }
};

}  // namespace
}  // namespace slimvit
