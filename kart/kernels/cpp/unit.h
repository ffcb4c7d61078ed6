// One function of a score that is evaluated in registers: the family's `struct Unit` with its base activation.

#pragma once

#include "vector.h"

// the family's unit and a multiple of the base activation
struct Based : Unit {
  static constexpr int P = Unit::P + (BASE > 0);
  float share = 0;
  Based(const float* options, const float* theta) : Unit(options, theta) {
    if (BASE > 0) share = theta[P - 1];
  }
  INLINE vec value(vec x) const {
    vec unused;
    if constexpr (BASE > 0) return Unit::value(x) + share * activation<BASE>(x, unused);
    return Unit::value(x);
  }
  INLINE vec slope(vec x, vec dy, vec* sums) const {
    const vec own = Unit::slope(x, dy, sums);
    if constexpr (BASE > 0) {
      vec rise;
      sums[P - 1] += dy * activation<BASE>(x, rise);
      return own + share * rise;
    }
    return own;
  }
  void finish(const float* sums, float* gradient) const {
    Unit::finish(sums, gradient);
    if (BASE > 0) gradient[P - 1] = sums[P - 1];
  }
};
