#pragma once

#include <immintrin.h>

#include "cpu/numbers.h"

// 512-bit vectors. Masks and loops aside, every instruction set has a struct with these names.

namespace slimvit {
namespace {

struct Avx512 {
  static constexpr Isa kIsa = Isa::avx512;
  static constexpr int kLanes = 16;
  static constexpr int kVecs = 3;       // vectors across a tile of the matrix product
  static constexpr int kValueVecs = 4;  // and of the attended values
  // Rows of a tile, by its vectors across: accumulators, operands and no spill in 32 registers.
  static constexpr int rows(int vecs) { return vecs == 4 ? 6 : 8; }

  using F = __m512;

  static SLIMVIT_INLINE F zero() { return _mm512_setzero_ps(); }
  static SLIMVIT_INLINE F set(float x) { return _mm512_set1_ps(x); }
  static SLIMVIT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static SLIMVIT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static SLIMVIT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static SLIMVIT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static SLIMVIT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static SLIMVIT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static SLIMVIT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static SLIMVIT_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }
  // 1 / sqrt(x), off by 4e-4 of it at most; and whether by so little that a step of Newton's makes
  // it a float32, in less time than a root and a division.
  static constexpr bool kRefinesRoots = true;
  static SLIMVIT_INLINE F inverse_root(F x) { return _mm512_rsqrt14_ps(x); }
  // Where `b` is NaN so is the result.
  static SLIMVIT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static SLIMVIT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  // x where a > b, else y.
  static SLIMVIT_INLINE F above(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
  }
  // The lesser of |a| and |b|; where one is NaN the other.
  static SLIMVIT_INLINE F min_magnitude(F a, F b) { return _mm512_range_ps(a, b, 0b1010); }
  // table[i], i the low five bits of what `at` has in memory.
  static constexpr bool kLooksUp = true;
  static SLIMVIT_INLINE F lookup(const float (&table)[32], F at) {
    return _mm512_permutex2var_ps(load(table), _mm512_castps_si512(at), load(table + 16));
  }
  static SLIMVIT_INLINE F round(F x) { return _mm512_roundscale_ps(x, 8); }
  static SLIMVIT_INLINE F scale(F x, F n) { return _mm512_scalef_ps(x, n); }  // x 2^n
  static SLIMVIT_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
  static SLIMVIT_INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }

  static SLIMVIT_INLINE F load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static SLIMVIT_INLINE void store(bf16* p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }

  // Operands of the matrix product: a step is one float32, or two bfloat16 that are multiplied and
  // added together.
  static SLIMVIT_INLINE F operand(const float* p) { return load(p); }
  static SLIMVIT_INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static SLIMVIT_INLINE F dot(F sum, F a, F b) { return _mm512_fmadd_ps(a, b, sum); }
  static SLIMVIT_INLINE __m512i operand(const bf16* p) { return _mm512_loadu_si512(p); }
  static SLIMVIT_INLINE __m512i broadcast(const bf16* p) { return _mm512_set1_epi32(word(p)); }
  static SLIMVIT_INLINE F dot(F sum, __m512i a, __m512i b) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
    return fma(odd(a), odd(b), fma(even(a), even(b), sum));
  }

  // Two rows of bfloat16 as steps: (a0, b0), (a1, b1), …
  static SLIMVIT_INLINE void interleave(const bf16* a, const bf16* b, bf16* out) {
    const auto wide = [](const bf16* p) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    const __m512i high = b == nullptr ? _mm512_setzero_si512() : _mm512_slli_epi32(wide(b), 16);
    _mm512_storeu_si512(out, _mm512_or_si512(wide(a), high));
  }

  // out[j][i] = in[i][j] for 16 rows of `in`, of which those from `valid` on count as zero, and
  // its first `columns` words; reads 16.
  static SLIMVIT_INLINE void transpose(const char* in, long in_stride, int valid, char* out,
                                       long out_stride, long columns) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i)
      r[i] = i < valid ? _mm512_loadu_si512(in + i * in_stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
        r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
      }
    // r[4 q + c] holds rows 4 q … 4 q + 3 of columns c, c + 4, c + 8, c + 12.
    for (int c = 0; c < 4; ++c) {
      const __m512i low_even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
      const __m512i low_odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
      const __m512i high_even = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
      const __m512i high_odd = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
      const auto put = [&](int column, __m512i x) {
        if (column < columns) _mm512_storeu_si512(out + column * out_stride, x);
      };
      put(c, _mm512_shuffle_i32x4(low_even, high_even, 0x88));
      put(c + 8, _mm512_shuffle_i32x4(low_even, high_even, 0xdd));
      put(c + 4, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
      put(c + 12, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
    }
  }
};

#ifdef __AVX512BF16__
struct Avx512Bf16 : Avx512 {
  static constexpr Isa kIsa = Isa::avx512_bf16;
  using Avx512::dot;
  using Avx512::store;

  static SLIMVIT_INLINE void store(bf16* p, F x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    __builtin_memcpy(p, &rounded, sizeof(rounded));
  }
  static SLIMVIT_INLINE F dot(F sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

}  // namespace
}  // namespace slimvit
