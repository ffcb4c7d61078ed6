// Vectors of floats for AVX-512, AVX2 or NEON: what `struct Piece` and `struct Unit` of a family are written in.
// Comparisons give vectors of integers, -1 for true, which `? :` selects by. No -ffast-math: it would delete
// the rounding by a magic number.

#pragma once

#include <cstdint>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16;       // floats in a vector
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
#elif defined(__aarch64__)
constexpr int W = 4;
#else
#error "needs AVX-512 (F, DQ), AVX2 with FMA, or 64-bit Arm"
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t iloose __attribute__((vector_size(4 * W), aligned(4), may_alias));

static INLINE vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
static INLINE void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }
// x - 0 is x to the bit and costs nothing; 0 + x is an addition for each, for it is 0 where x is -0
static INLINE vec splat(float x) { return x - vec{}; }
static INLINE vec keep(vec x, ivec mask) { return (vec)((ivec)x & mask); }
static INLINE float total(vec x) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

// lanes FROM of the two, those of b counted on from a's
template <int... FROM>
static INLINE vec pick(vec a, vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, FROM...);
#else
  return __builtin_shuffle(a, b, (ivec){FROM...});
#endif
}

static INLINE vec magnitude(vec x) { return (vec)((ivec)x & INT32_MAX); }
// 1, -1, or 0 for 0
static INLINE vec sign(vec x) { return x > 0.0f ? splat(1.0f) : x < 0.0f ? splat(-1.0f) : vec{}; }

// all keep a NaN in x
static INLINE vec clamp_above(vec low, vec x) { return x < low ? low : x; }
static INLINE vec clamp_below(vec high, vec x) { return x > high ? high : x; }
// the integer below |x| < 2^22
static INLINE vec floor(vec x) {
  const vec n = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  return n > x ? n - 1.0f : n;
}
static INLINE vec clamp(vec x, float low, float high) { return clamp_below(splat(high), clamp_above(splat(low), x)); }

// Sine and cosine to 1 ulp of 1 for |x| < 2^20 and 3 for |x| < 2^22: whole quarter turns are taken off in
// three parts, each product exact in the fused multiply-add (Cody and Waite), then polynomials that are made
// for [-pi/4, pi/4] (Cephes); the rounding of 2 / pi moves the remainder out of it, to 0.96 at 2^22. Beyond,
// neighbouring floats are half a radian and more apart: the remainder is held, so that the result stays on
// the unit circle.
static INLINE void sincos(vec x, vec& sine, vec& cosine) {
  const vec shifted = x * 0.63661977236758134f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const vec turns = shifted - 12582912.0f;
  const ivec quadrant = (ivec)shifted;  // its low bits count quarter turns
  vec r = x - turns * 1.57079637050628662f;
  r = r + turns * 4.37113900018624283e-8f;
  r = r + turns * 1.71512448e-15f;
  r = clamp(r, -1.0f, 1.0f);
  const vec z = r * r;
  const vec s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const vec c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
                0.5f * z + 1.0f;
  const ivec odd = (quadrant << 31) >> 31;
  const ivec sine_sign = (quadrant << 30) & INT32_MIN;
  const ivec cosine_sign = sine_sign ^ (odd & INT32_MIN);
  sine = (vec)((ivec)(odd ? c : s) ^ sine_sign);
  cosine = (vec)((ivec)(odd ? s : c) ^ cosine_sign);
}

// sin(pi u) for |u| <= 1/2
static INLINE vec sine_half_turns(vec u) {
  const vec r = u * 3.14159265358979f, z = r * r;
  const vec p = (((-2.5052108e-8f * z + 2.7557319e-6f) * z - 1.9841270e-4f) * z + 8.3333333e-3f) * z - 1.6666667e-1f;
  return p * z * r + r;
}

// e^x to 2 ulp; 0 below the normal numbers, the largest number above them
static INLINE vec exponential(vec x) {
  const vec held = clamp(x, -87.3f, 88.7f);
  const vec shifted = held * 1.44269504088896f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const vec n = shifted - 12582912.0f;
  const vec r = (held - n * 0.693359375f) + n * 2.12194440e-4f;
  const vec p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                 1.6666665459e-1f) * r + 5.0000001201e-1f;
  const vec y = p * (r * r) + (r + 1.0f);
  const vec scaled = (vec)((ivec)y + ((ivec)shifted << 23));
  return x < -87.3f ? vec{} : scaled;
}

static INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

// The normal distribution function and its density, to 2 ulp of 1 (Abramowitz and Stegun 7.1.26)
static INLINE vec normal(vec x, vec& density) {
  const vec z = magnitude(x) * 0.70710678118655f;
  const vec e = exponential(-0.5f * x * x), t = 1.0f / (1.0f + 0.3275911f * z);
  const vec tail = 0.5f * e * t *
      ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f);
  density = 0.39894228040143f * e;
  return x < 0.0f ? tail : 1.0f - tail;
}

// a base activation and its slope; BASE is 0 for none, 1 the identity, 2 SiLU, 3 GELU
template <int KIND>
static INLINE vec activation(vec x, vec& slope) {
  if constexpr (KIND == 2) {
    const vec s = sigmoid(x), y = x * s;
    slope = s + y * (1.0f - s);
    return y;
  }
  if constexpr (KIND == 3) {
    vec density;
    const vec s = normal(x, density);
    slope = s + x * density;
    return x * s;
  }
  slope = splat(1.0f);
  return x;
}
