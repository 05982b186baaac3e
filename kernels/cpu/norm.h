// RMSNorm of one row.
#pragma once

#include <cmath>

#include "vec.h"

// out [size] = x / rms(x) * weight. Sizes are multiples of kLanes, and `out` may be `x`. Llama's variant rounds before
// multiplying with the weight; Gemma's variant multiplies by 1 + weight and rounds once.
template <class T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps, bool gemma) {
  Vec squares[4] = {};
  for (int64_t i = 0, n = 0; i < size; i += kLanes, n = (n + 1) % 4) {
    const Vec v = load(x + i);
    squares[n] += v * v;
  }
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const float factor = 1.0f / std::sqrt(total / float(size) + eps);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec normed = load(x + i) * factor, w = load(weight + i);
    store(out + i, gemma ? normed * (w + 1.0f) : rounded_to<T>(normed) * w);
  }
}
