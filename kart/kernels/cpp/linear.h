// A family that is linear in its parameters, `struct Piece`, as one function with a parameter for each feature.

#pragma once

#include "vector.h"

struct Unit {
  static constexpr int P = Piece::K;
  Piece piece;
  float theta[P];
  Unit(const float* options, const float* parameters) : piece(options) {
    for (int j = 0; j < P; ++j) theta[j] = parameters[j];
  }
  INLINE vec value(vec x) const {
    vec f[P], y = vec{};
    piece.features(x, f);
    UNROLL for (int j = 0; j < P; ++j) y += theta[j] * f[j];
    return y;
  }
  INLINE vec slope(vec x, vec dy, vec* sums) const {
    vec f[P], g[P], y = vec{};
    piece.features(x, f);
    piece.slopes(x, f, g);
    UNROLL for (int j = 0; j < P; ++j) {
      sums[j] += dy * f[j];
      y += theta[j] * g[j];
    }
    return y;
  }
  void finish(const float* sums, float* gradient) const {
    for (int j = 0; j < P; ++j) gradient[j] = sums[j];
  }
};
