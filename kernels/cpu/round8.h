// Quantizes rows of numbers to bytes (codes) with a scale.
#pragma once

#include "vec.h"

// The factors that convert numbers of at most `bound` in magnitude to codes (`inverse`) and codes to numbers (`scale`).
// `scale` is NaN when the bound is not finite.
struct Rounding {
  float inverse, scale;

  explicit Rounding(float bound)
      : inverse(bound > 1e-30f ? 127.0f / bound : 0.0f), scale(bound / 127.0f + bound * 0.0f) {}
};

// Rounds to nearest, ties to even.
inline Int round_to_codes(Vec x, float inverse) {
  return bit_cast<Int>(x * inverse + 12582912.0f) - 0x4B400000;  // the sum has the rounded integer in its low bits
}

// The same codes as bytes.
inline Byte round_to_bytes(Vec x, float inverse) {
#if defined(__AVX512F__)  // GCC compiles a conversion that keeps the low bits only to one move for each lane
  return bit_cast<Byte>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(x * inverse + 12582912.0f)));
#else
  return __builtin_convertvector(round_to_codes(x, inverse), Byte);
#endif
}

// Reduces the lanes of a vector with `join`.
template <class Join>
inline int32_t joined(Int v, Join join) {
  using Int4 = int32_t __attribute__((vector_size(16)));
  Int4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  Int4 all = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) all = join(all, parts[i]);
  all = join(all, Int4{all[2], all[3], all[0], all[1]});
  return join(all, Int4{all[1], all[0], all[3], all[2]})[0];
}

// `magnitude_bits` are the bits of numbers without the sign. Compared as integers they have the order of the
// magnitudes, and infinity and NaN are above all finite numbers. `largest_of` returns the largest magnitude from bits
// reduced by `larger`.
inline Int magnitude_bits(Vec v) { return bit_cast<Int>(v) & 0x7fffffff; }
constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };
inline float largest_of(Int bits) { return bit_cast<float>(joined(bits, larger)); }

constexpr auto added = [](auto a, auto b) { return a + b; };

// `size` is a multiple of kLanes.
template <class T>
inline float largest_magnitude(const T* x, int64_t size) {
  Int largest = {};
  for (int64_t i = 0; i < size; i += kLanes) largest = larger(largest, magnitude_bits(load(x + i)));
  return largest_of(largest);
}

// The result of `round_row8` besides the codes: their scale and their sum.
struct RoundedRow {
  float scale;
  int32_t sum;
};

// Calls put(i, codes) for codes i .. i + kLanes - 1 of each vector of codes [size] = x / scale.
template <class T, class Put>
inline RoundedRow round_row8(const T* x, int64_t size, const Put& put) {
  const Rounding rounding(largest_magnitude(x, size));
  Int total = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Int code = round_to_codes(load(x + i), rounding.inverse);
    put(i, __builtin_convertvector(code, Byte));
    total += code;
  }
  return {rounding.scale, joined(total, added)};
}
