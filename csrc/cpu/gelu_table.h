#pragma once

#include "cpu/inline.h"

// GELU for bfloat16 where 32 numbers can be looked up at once: max(x, 0) - c(|x|), and what is cut
// off c(a) = a Φ(-a) in 32 parabolas (minimax fits of our own) about the multiples of kGeluStep.
// The first leaves zero with the slope of c, 1 / 2; the last is zero. Off by at most 1.4e-5 and,
// where |x| < 0.075, by 2e-5 of the result.

namespace slimvit {
namespace {

constexpr float kGeluStep = 0.15f;
alignas(64) constexpr float kGeluConstant[32] = {
    0.0f,        8.45673931e-05f, 0.00148389f, 0.00725297f, 0.0213426f, 0.0472507f, 0.0867425f,
    0.1390103f,  0.2005015f,      0.265445f,   0.3269127f,  0.378121f,  0.4136441f, 0.4302703f,
    0.4273331f,  0.4065723f,      0.3715386f,  0.3268171f,  0.2772168f, 0.2270913f, 0.1798868f,
    0.1379391f,  0.1024871f,      0.0738409f,  0.0516268f,  0.0350489f, 0.0231169f, 0.0148202f,
    0.00923912f, 0.00560312f,     0.00330675f, 0.0f};
alignas(64) constexpr float kGeluSlope[32] = {
    0.5f,         0.4982549f,   0.4862953f,   0.4559228f,  0.402534f,   0.3259332f,  0.2302393f,
    0.1229627f,   0.013505f,    -0.0885573f,  -0.1750386f, -0.2402712f, -0.2816398f, -0.2995211f,
    -0.2967274f,  -0.2777057f,  -0.2476046f,  -0.2114759f, -0.1736772f, -0.1375322f, -0.1052324f,
    -0.0779255f,  -0.055918f,   -0.038924f,   -0.0263057f, -0.0172727f, -0.0110259f, -0.00684591f,
    -0.00413629f, -0.00243289f, -0.00139352f, 0.0f};
alignas(64) constexpr float kGeluSquare[32] = {
    -0.3986325f, -0.3895981f,  -0.3638483f,  -0.3237467f, -0.2730871f, -0.216409f,  -0.1583996f,
    -0.1033278f, -0.0545997f,  -0.0144892f,  0.0159362f,  0.0367143f,  0.04876f,    0.0535681f,
    0.0529047f,  0.0485473f,   0.042081f,    0.0347837f,  0.027582f,   0.0210656f,  0.01554f,
    0.0110958f,  0.00768021f,  0.00515976f,  0.00336779f, 0.00213727f, 0.00131963f, 0.000793141f,
    0.00046425f, 0.000264741f, 0.000147129f, 0.0f};

template <class S>
SLIMVIT_INLINE typename S::F gelu_by_table(typename S::F x) {
  constexpr float kIntegers = 8388608.0f;  // from here on floats are integers, in their low bits
  const auto a = S::min_magnitude(x, S::set(31 * kGeluStep));
  const auto at = S::fma(a, S::set(1 / kGeluStep), S::set(kIntegers));
  const auto square = S::lookup(kGeluSquare, at);
  const auto slope = S::lookup(kGeluSlope, at);
  const auto constant = S::lookup(kGeluConstant, at);
  const auto cut = S::fma(S::fma(square, a, slope), a, constant);
  return S::sub(S::max(S::zero(), x), cut);
}

}  // namespace
}  // namespace slimvit
