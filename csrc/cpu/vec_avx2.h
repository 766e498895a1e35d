#pragma once

#include <immintrin.h>

#include "cpu/numbers.h"

// 256-bit vectors with the names of Avx512.

namespace slimvit {
namespace {

struct Avx2 {
  static constexpr Isa kIsa = Isa::avx2;
  static constexpr int kLanes = 8;
  static constexpr int kVecs = 2;
  static constexpr int kValueVecs = 2;
  static constexpr int rows(int vecs) { return vecs == 1 ? 8 : 6; }

  using F = __m256;

  static SLIMVIT_INLINE F zero() { return _mm256_setzero_ps(); }
  static SLIMVIT_INLINE F set(float x) { return _mm256_set1_ps(x); }
  static SLIMVIT_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static SLIMVIT_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static SLIMVIT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static SLIMVIT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static SLIMVIT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static SLIMVIT_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static SLIMVIT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static SLIMVIT_INLINE F sqrt(F x) { return _mm256_sqrt_ps(x); }
  static constexpr bool kLooksUp = false;  // see Avx512
  static constexpr bool kRefinesRoots = false;
  static SLIMVIT_INLINE F inverse_root(F x) { return _mm256_rsqrt_ps(x); }
  static SLIMVIT_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static SLIMVIT_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static SLIMVIT_INLINE F above(F a, F b, F x, F y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static SLIMVIT_INLINE F round(F x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static SLIMVIT_INLINE F scale(F x, F n) {  // n an integer in [-126, 127]
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static SLIMVIT_INLINE float sum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static SLIMVIT_INLINE float largest(F x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }

  static SLIMVIT_INLINE F load(const bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static SLIMVIT_INLINE void store(bf16* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  static SLIMVIT_INLINE F operand(const float* p) { return load(p); }
  static SLIMVIT_INLINE F broadcast(const float* p) { return _mm256_set1_ps(*p); }
  static SLIMVIT_INLINE F dot(F sum, F a, F b) { return _mm256_fmadd_ps(a, b, sum); }
  static SLIMVIT_INLINE __m256i operand(const bf16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static SLIMVIT_INLINE __m256i broadcast(const bf16* p) { return _mm256_set1_epi32(word(p)); }
  static SLIMVIT_INLINE F dot(F sum, __m256i a, __m256i b) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const auto even = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
    const auto odd = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, high)); };
    return fma(odd(a), odd(b), fma(even(a), even(b), sum));
  }

  static SLIMVIT_INLINE void interleave(const bf16* a, const bf16* b, bf16* out) {
    const auto wide = [](const bf16* p) {
      return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    };
    const __m256i high = b == nullptr ? _mm256_setzero_si256() : _mm256_slli_epi32(wide(b), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(wide(a), high));
  }

  static SLIMVIT_INLINE void transpose(const char* in, long in_stride, int valid, char* out,
                                       long out_stride, long columns) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i)
      r[i] = i < valid ? load(reinterpret_cast<const float*>(in + i * in_stride)) : zero();
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int c = 0; c < 4; ++c) {
      const auto put = [&](int column, __m256 x) {
        if (column < columns) store(reinterpret_cast<float*>(out + column * out_stride), x);
      };
      put(c, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
      put(c + 4, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
  }
};

}  // namespace
}  // namespace slimvit
