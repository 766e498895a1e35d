#pragma once

#include "cpu/gelu_table.h"
#include "cpu/gemm.h"
#include "cpu/packs.h"

// 2^x and the activations of an MLP, on vectors. Coefficients are minimax fits of our own.

namespace slimvit {
namespace {

// c[0] + c[1] x + c[2] x² + …
template <class S, int N>
SLIMVIT_INLINE typename S::F polynomial(const float (&c)[N], typename S::F x) {
  auto y = S::set(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = S::fma(y, x, S::set(c[i]));
  return y;
}

// 2^x for x ≤ 127, zero or nearly so below -125; relative error 2e-9 and rounding for float32, and
// 3e-6, a thousandth of its rounding, for bfloat16.
template <class S, typename T>
SLIMVIT_INLINE typename S::F exp2(typename S::F x) {
  x = S::max(S::set(-125.0f), x);
  const auto n = S::round(x);
  const auto r = S::sub(x, n);
  if constexpr (kStep<T> == 1) {
    constexpr float c[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                           0.00961848896f, 0.00133999315f, 0.000153458122f};
    return S::scale(polynomial<S>(c, r), n);
  } else {
    constexpr float c[] = {0.999999261f, 0.693121814f, 0.240247448f, 0.0559178632f, 0.00957010206f};
    return S::scale(polynomial<S>(c, r), n);
  }
}

// x Φ(x) = 0.5 x (1 + erf(x / √2)). Φ(x) - 0.5 = x R(x²), R rational with a relative error below
// float32 rounding; for bfloat16 a polynomial, off by at most 6e-5.
template <class S, typename T>
SLIMVIT_INLINE typename S::F gelu_by_fit(typename S::F x) {
  const float kEnd = kStep<T> == 1 ? 5.5f : 4.5f;  // beyond it Φ is 0 or 1
  x = S::max(S::set(-kEnd), x);                    // NaN stays
  const auto clamped = S::min(S::set(kEnd), x);
  const auto u = S::mul(clamped, clamped);
  if constexpr (kStep<T> == 1) {
    constexpr float p[] = {0.398941985f,    0.0351415224f,   0.00476156386f,
                           0.000182849535f, 6.53064209e-06f, 2.22163281e-08f};
    constexpr float q[] = {1.0f,           0.254750321f,    0.0293982247f,
                           0.00196238591f, 7.86072961e-05f, 1.19540235e-06f};
    const auto ratio = S::div(S::mul(clamped, polynomial<S>(p, u)), polynomial<S>(q, u));
    return S::mul(x, S::add(ratio, S::set(0.5f)));
  } else {
    constexpr float p[] = {0.398827816f,    -0.0662177937f,   0.00974668603f,  -0.00109219575f,
                           9.18379699e-05f, -5.64822981e-06f, 2.43648234e-07f, -6.90961473e-09f,
                           1.14736176e-10f, -8.39734768e-13f};
    return S::mul(x, S::fma(clamped, polynomial<S>(p, u), S::set(0.5f)));
  }
}

template <class S, typename T>
SLIMVIT_INLINE typename S::F gelu(typename S::F x) {
  if constexpr (S::kLooksUp)
    return gelu_by_table<S, T>(x);
  else
    return gelu_by_fit<S, T>(x);
}

// x / (1 + exp(-z)); z a multiple of x.
template <class S, typename T>
SLIMVIT_INLINE typename S::F gated(typename S::F x, typename S::F z) {
  const auto t = S::min(S::set(125.0f), S::mul(z, S::set(-1.44269504f)));
  return S::div(x, S::add(S::set(1.0f), exp2<S, T>(t)));
}

template <class S, typename T>
SLIMVIT_INLINE typename S::F activate(Activation kind, typename S::F x) {
  if (kind == Activation::gelu) return gelu<S, T>(x);
  if (kind == Activation::quick_gelu) return gated<S, T>(x, S::mul(x, S::set(1.702f)));
  // gelu_tanh: 0.5 x (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2 / π) (x + 0.044715 x³).
  const auto cube = S::fma(S::mul(S::mul(x, x), x), S::set(0.044715f), x);
  return gated<S, T>(x, S::mul(cube, S::set(1.59576912f)));
}

// 1 / sqrt(x), off by two roundings of float32 at most; for bfloat16 as the processor guesses it.
template <class S, typename T>
SLIMVIT_INLINE typename S::F inverse_root(typename S::F x) {
  if constexpr (kStep<T> != 1) {
    return S::inverse_root(x);
  } else if constexpr (S::kRefinesRoots) {  // by a step of Newton's
    const auto guess = S::inverse_root(x);
    const auto half = S::mul(S::mul(x, S::set(-0.5f)), guess);
    return S::mul(guess, S::fma(half, guess, S::set(1.5f)));
  } else {
    return S::div(S::set(1.0f), S::sqrt(x));
  }
}

// The mean of an activation over a Gaussian of mean x and variance s, exactly that of GELU:
//   (act(z) + (1 - r²) φ(z)) / r,  r = 1 / sqrt(1 + s),  z = r x
template <class S, typename T>
SLIMVIT_INLINE typename S::F activate_spread(Activation kind, typename S::F x, typename S::F s) {
  const auto t = S::add(S::set(1.0f), s);
  const auto r = inverse_root<S, T>(t);
  const auto z = S::mul(x, r);
  const auto density = exp2<S, T>(S::mul(S::mul(z, z), S::set(-0.721347520f)));
  const auto weight = S::mul(S::mul(s, S::set(0.398942280f)), S::mul(r, r));
  return S::mul(S::fma(weight, density, activate<S, T>(kind, z)), S::mul(t, r));
}

// out = activation(result); where `share` is given the mean of it in rows that stand for several
// tokens, whose results have a variance of share [row] · squares [column].
template <class S, typename T>
struct Activate : FromBias<S> {
  static constexpr int kMaxVecs = S::kVecs;
  T* out;
  long ld;
  Activation kind;
  const float* share = nullptr;
  const float* squares = nullptr;

  template <int MR, int NV>
  SLIMVIT_INLINE void end(typename S::F (&acc)[MR][NV], long row, long column) const {
    if (share != nullptr && stand_for_several<MR>(row))
      mean(acc, row, column);
    else if (kind == Activation::gelu)
      each<MR, NV>(acc, row, column, [](auto x) { return gelu<S, T>(x); });
    else
      each<MR, NV>(acc, row, column, [&](auto x) { return activate<S, T>(kind, x); });
  }

 private:
  template <int MR>
  SLIMVIT_INLINE bool stand_for_several(long row) const {
    bool any = false;
    for (int i = 0; i < MR; ++i) any |= share[row + i] != 0.0f;
    return any;
  }

  // A loop over rows that is not unrolled: of a copy, so that `acc` need not be in memory before.
  template <int MR, int NV>
  SLIMVIT_INLINE void mean(typename S::F (&acc)[MR][NV], long row, long column) const {
    typename S::F results[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) results[i][j] = acc[i][j];
    for (int i = 0; i < MR; ++i) {
      const float s = share[row + i];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const long at = column + j * S::kLanes;
        const auto x = results[i][j];
        const auto y =
            s == 0.0f ? activate<S, T>(kind, x)
                      : activate_spread<S, T>(kind, x, S::mul(S::set(s), S::load(squares + at)));
        S::store(out + (row + i) * ld + at, y);
      }
    }
  }

  template <int MR, int NV, class Fn>
  SLIMVIT_INLINE void each(typename S::F (&acc)[MR][NV], long row, long column, Fn fn) const {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        S::store(out + (row + i) * ld + column + j * S::kLanes, fn(acc[i][j]));
  }
};

}  // namespace
}  // namespace slimvit
