#pragma once

#include <arm_neon.h>

#include "cpu/numbers.h"

// 128-bit vectors of Arm, with the names of Avx512.

namespace slimvit {
namespace {

struct Neon {
  static constexpr Isa kIsa = Isa::neon;
  static constexpr int kLanes = 4;
  static constexpr int kVecs = 4;
  static constexpr int kValueVecs = 4;
  static constexpr int rows(int vecs) { return vecs == 4 ? 6 : 8; }

  using F = float32x4_t;

  static SLIMVIT_INLINE F zero() { return vdupq_n_f32(0.0f); }
  static SLIMVIT_INLINE F set(float x) { return vdupq_n_f32(x); }
  static SLIMVIT_INLINE F load(const float* p) { return vld1q_f32(p); }
  static SLIMVIT_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
  static SLIMVIT_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static SLIMVIT_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
  static SLIMVIT_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static SLIMVIT_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
  static SLIMVIT_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static SLIMVIT_INLINE F sqrt(F x) { return vsqrtq_f32(x); }
  static constexpr bool kLooksUp = false;  // see Avx512
  static constexpr bool kRefinesRoots = false;
  static SLIMVIT_INLINE F inverse_root(F x) { return vdivq_f32(set(1.0f), vsqrtq_f32(x)); }
  // Where either is NaN the result is `b`, as everywhere; vminq's would be NaN.
  static SLIMVIT_INLINE F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static SLIMVIT_INLINE F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static SLIMVIT_INLINE F above(F a, F b, F x, F y) { return vbslq_f32(vcgtq_f32(a, b), x, y); }
  static SLIMVIT_INLINE F round(F x) { return vrndnq_f32(x); }
  static SLIMVIT_INLINE F scale(F x, F n) {  // n an integer in [-126, 127]; of NaN 0
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  static SLIMVIT_INLINE float sum(F x) { return vaddvq_f32(x); }
  static SLIMVIT_INLINE float largest(F x) {
    const F pairs = max(x, vextq_f32(x, x, 2));
    return vgetq_lane_f32(max(pairs, vextq_f32(pairs, pairs, 1)), 0);
  }

  static SLIMVIT_INLINE F load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
  }
  static SLIMVIT_INLINE void store(bf16* p, F x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(odd, vdupq_n_u32(0x7fff));
    const uint32x4_t rounded =
        vbslq_u32(vceqq_f32(x, x), vaddq_u32(bits, up), vdupq_n_u32(0x7fc00000));
    vst1_u16(&p->bits, vshrn_n_u32(rounded, 16));
  }

  static SLIMVIT_INLINE F operand(const float* p) { return load(p); }
  static SLIMVIT_INLINE F broadcast(const float* p) { return vld1q_dup_f32(p); }
  static SLIMVIT_INLINE F dot(F sum, F a, F b) { return vfmaq_f32(sum, a, b); }
  static SLIMVIT_INLINE uint32x4_t operand(const bf16* p) {
    return vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  }
  static SLIMVIT_INLINE uint32x4_t broadcast(const bf16* p) {
    return vdupq_n_u32(static_cast<std::uint32_t>(word(p)));
  }
  static SLIMVIT_INLINE F dot(F sum, uint32x4_t a, uint32x4_t b) {
    const auto even = [](uint32x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); };
    const auto odd = [](uint32x4_t x) {
      return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
    };
    return fma(odd(a), odd(b), fma(even(a), even(b), sum));
  }

  static SLIMVIT_INLINE void interleave(const bf16* a, const bf16* b, bf16* out) {
    vst2_u16(&out->bits, {vld1_u16(&a->bits), b == nullptr ? vdup_n_u16(0) : vld1_u16(&b->bits)});
  }

  static SLIMVIT_INLINE void transpose(const char* in, long in_stride, int valid, char* out,
                                       long out_stride, long columns) {
    uint64x2_t pairs[4];  // [2 i + j]: rows 2 i and 2 i + 1, columns j and j + 2
    for (int i = 0; i < 4; i += 2) {
      const auto row = [&](int r) {
        return r < valid ? vreinterpretq_u32_u8(
                               vld1q_u8(reinterpret_cast<const std::uint8_t*>(in + r * in_stride)))
                         : vdupq_n_u32(0);
      };
      pairs[i] = vreinterpretq_u64_u32(vtrn1q_u32(row(i), row(i + 1)));
      pairs[i + 1] = vreinterpretq_u64_u32(vtrn2q_u32(row(i), row(i + 1)));
    }
    const auto put = [&](int column, uint64x2_t x) {
      if (column < columns)
        vst1q_u8(reinterpret_cast<std::uint8_t*>(out + column * out_stride),
                 vreinterpretq_u8_u64(x));
    };
    for (int j = 0; j < 2; ++j) {
      put(j, vtrn1q_u64(pairs[j], pairs[2 + j]));
      put(j + 2, vtrn2q_u64(pairs[j], pairs[2 + j]));
    }
  }
};

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
struct NeonBf16 : Neon {
  static constexpr Isa kIsa = Isa::neon_bf16;
  using Neon::dot;
  using Neon::store;

  static SLIMVIT_INLINE void store(bf16* p, F x) {
    const bfloat16x4_t rounded = vcvt_bf16_f32(x);
    __builtin_memcpy(p, &rounded, sizeof(rounded));
  }
  static SLIMVIT_INLINE F dot(F sum, uint32x4_t a, uint32x4_t b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
  }
};
#endif

}  // namespace
}  // namespace slimvit
