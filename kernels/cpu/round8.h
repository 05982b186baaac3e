// Rows of numbers as bytes with a scale, and how the paged cache has them.
//
// kPart tokens of a head lie side by side, [parts, heads, (dim + 4) * kPart] bytes: of keys [dim / 4, kPart, 4] codes,
// 128 larger than they are, of values [kPart / 4, dim, 4], and then the kPart scales. So either is multiplied as it
// lies in memory, four products per lane: the vectors of a product have a lane per token, or per number of a value.
#pragma once

#include "vec.h"

// Tokens that lie side by side: pages are multiples of it, and no vector is longer.
constexpr int64_t kPart = 16;

// Bytes that the cache has of a token and head.
inline int64_t row_size8(int64_t dim) { return dim + sizeof(float); }

// What numbers up to `bound` in magnitude are multiplied by to become codes, and codes to become numbers: what is not a
// number when the bound is not finite.
struct Rounding {
  float inverse, scale;

  explicit Rounding(float bound)
      : inverse(bound > 1e-30f ? 127.0f / bound : 0.0f), scale(bound / 127.0f + bound * 0.0f) {}
};

// To the nearest, ties to even.
inline Int round_to_codes(Vec x, float inverse) {
  return bit_cast<Int>(x * inverse + 12582912.0f) - 0x4B400000;  // it lands in the low bits
}

// The lanes of a vector put together.
template <class Join>
inline int32_t joined(Int v, Join join) {
  using Int4 = int32_t __attribute__((vector_size(16)));
  Int4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] = join(parts[0], parts[i]);
  return join(join(parts[0][0], parts[0][1]), join(parts[0][2], parts[0][3]));
}

// The largest magnitude of numbers whose bits, without the sign, were put together by `larger`: as integers these have
// the order of the numbers, and what is not finite is above all that is.
inline Int magnitude_bits(Vec v) { return bit_cast<Int>(v) & 0x7fffffff; }

inline Int larger(Int a, Int b) { return a > b ? a : b; }

inline float largest_of(Int bits) {
  return bit_cast<float>(joined(bits, [](auto a, auto b) { return a > b ? a : b; }));
}

// `size` is a multiple of kLanes.
template <class T>
inline float largest_magnitude(const T* x, int64_t size) {
  Int largest = {};
  for (int64_t i = 0; i < size; i += kLanes) largest = larger(largest, magnitude_bits(load(x + i)));
  return largest_of(largest);
}

// codes [size] = x / scale; returns the scale and, of the codes, the sum.
struct RoundedRow {
  float scale;
  int32_t sum;
};

template <class T>
inline RoundedRow round_row8(const T* x, int64_t size, int8_t* codes) {
  const Rounding rounding(largest_magnitude(x, size));
  Int total = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Int code = round_to_codes(load(x + i), rounding.inverse);
    const auto narrow = __builtin_convertvector(code, Byte);
    std::memcpy(codes + i, &narrow, sizeof narrow);
    total += code;
  }
  return {rounding.scale, joined(total, [](auto a, auto b) { return a + b; })};
}

// Token `at` of a part takes its place there.
template <class T>
inline void write_key8(const T* key, int64_t dim, int64_t at, Int8* part, int8_t* codes) {
  const float scale = round_row8(key, dim, codes).scale;
  for (int64_t i = 0; i < dim; i += 4) {
    uint32_t four;
    std::memcpy(&four, codes + i, sizeof four);
    four ^= 0x80808080;
    std::memcpy(part + i * kPart + at * 4, &four, sizeof four);
  }
  std::memcpy(part + dim * kPart + at * sizeof scale, &scale, sizeof scale);
}

template <class T>
inline void write_value8(const T* value, int64_t dim, int64_t at, Int8* part, int8_t* codes) {
  const float scale = round_row8(value, dim, codes).scale;
  Int8* to = part + at / 4 * 4 * dim + at % 4;
  for (int64_t i = 0; i < dim; ++i) to[4 * i].code = codes[i];
  std::memcpy(part + dim * kPart + at * sizeof scale, &scale, sizeof scale);
}
