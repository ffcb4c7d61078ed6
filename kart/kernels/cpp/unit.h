// One function of a score that is evaluated in registers: the family's `struct Unit` with its base activation.

#pragma once

#include "vector.h"

// the family's unit and a multiple of the base activation: 0 none, 1 identity, 2 SiLU, 3 GELU
struct Based : Unit {
  static constexpr int P = Unit::P + (BASE > 0);
  float share = 0;
  Based(const float* options, const float* theta) : Unit(options, theta) {
    if (BASE > 0) share = theta[P - 1];
  }
  static INLINE vec activation(vec x, vec& slope) {
    if constexpr (BASE == 2) {
      const vec s = sigmoid(x), y = x * s;
      slope = s + y * (1.0f - s);
      return y;
    }
    if constexpr (BASE == 3) {
      vec density;
      const vec s = normal(x, density);
      slope = s + x * density;
      return x * s;
    }
    slope = splat(1.0f);
    return x;
  }
  INLINE vec value(vec x) const {
    vec unused;
    if constexpr (BASE > 0) return Unit::value(x) + share * activation(x, unused);
    return Unit::value(x);
  }
  INLINE vec slope(vec x, vec dy, vec* sums) const {
    const vec own = Unit::slope(x, dy, sums);
    if constexpr (BASE > 0) {
      vec rise;
      sums[P - 1] += dy * activation(x, rise);
      return own + share * rise;
    }
    return own;
  }
  void finish(const float* sums, float* gradient) const {
    Unit::finish(sums, gradient);
    if (BASE > 0) gradient[P - 1] = sums[P - 1];
  }
};
