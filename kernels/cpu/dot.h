// Dot products of bytes with 32-bit sums, the only operation that the vector types of vec.h cannot express.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vec.h"

// `dot<Bits>(sum, w, x)`: every lane of `w` holds four weights of 0 .. 2^Bits - 1, from each of which kCentre is
// subtracted, and every lane of `x` holds four inputs, signed bytes of at least -127. The sum of the four products is
// added to the same lane of `sum`.
//
// On levels where `dot` takes several instructions, weights of 4 bits have a cheaper method: `narrow_dot` adds in 16
// bits, which have room for kNarrowDots times 2 * 15 * 127, and `widened` adds these sums to a sum of 32 bits.
//
// `dot_plain` is `dot` for weights of 0 .. kMostPlain, from which nothing is subtracted.

// A vector with the four bytes at `p` in every lane.
inline Int splat_four(const void* p) { return Int{} + read<int32_t>(p); }

#if (defined(__AVX512BW__) && !defined(__AVX512VNNI__)) || \
    (defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512F__))

template <int Bits>
constexpr int32_t kCentre = Bits == 8 ? 128 : 0;
constexpr int kNarrowDots = 8;

// `pairs` returns sums of two products in 16 bits, with saturation: two products of 128 * 127 fit, two of 255 * 127 do
// not.
#if defined(__AVX512BW__)
inline Int pairs(Int w, Int x) {
  return bit_cast<Int>(_mm512_maddubs_epi16(bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
}
inline Int widened(Int sum, Int pairs) {
  return sum + bit_cast<Int>(_mm512_madd_epi16(bit_cast<__m512i>(pairs), _mm512_set1_epi16(1)));
}
inline Int magnitude(Int w) { return bit_cast<Int>(_mm512_abs_epi8(bit_cast<__m512i>(w))); }
inline Int signed_as(Int x, Int w) {
  const __m512i v = bit_cast<__m512i>(x);
  return bit_cast<Int>(_mm512_mask_sub_epi8(v, _mm512_movepi8_mask(bit_cast<__m512i>(w)), _mm512_setzero_si512(), v));
}
using Short = int16_t __attribute__((vector_size(64)));
#else
inline Int pairs(Int w, Int x) {
  return bit_cast<Int>(_mm256_maddubs_epi16(bit_cast<__m256i>(w), bit_cast<__m256i>(x)));
}
inline Int widened(Int sum, Int pairs) {
  return sum + bit_cast<Int>(_mm256_madd_epi16(bit_cast<__m256i>(pairs), _mm256_set1_epi16(1)));
}
inline Int magnitude(Int w) { return bit_cast<Int>(_mm256_abs_epi8(bit_cast<__m256i>(w))); }
inline Int signed_as(Int x, Int w) {
  return bit_cast<Int>(_mm256_sign_epi8(bit_cast<__m256i>(x), bit_cast<__m256i>(w)));
}
using Short = int16_t __attribute__((vector_size(32)));
#endif

template <int Bits>
inline Int dot(Int sum, Int w, Int x) {
  if constexpr (Bits == 4) return widened(sum, pairs(w, x));
  w ^= int32_t(0x80808080);
  return widened(sum, pairs(magnitude(w), signed_as(x, w)));
}
constexpr int32_t kMostPlain = 127;  // as two products fit 16 bits
inline Int dot_plain(Int sum, Int w, Int x) { return widened(sum, pairs(w, x)); }
inline Int narrow_dot(Int narrow, Int w, Int x) {
  return bit_cast<Int>(bit_cast<Short>(narrow) + bit_cast<Short>(pairs(w, x)));
}

#else

template <int Bits>
constexpr int32_t kCentre = 0;
constexpr int kNarrowDots = 0;
Int narrow_dot(Int narrow, Int w, Int x);
Int widened(Int sum, Int narrow);

template <int Bits>
inline Int dot(Int sum, Int w, Int x) {
#if defined(__AVX512VNNI__)
  return bit_cast<Int>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return bit_cast<Int>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(w), bit_cast<__m256i>(x)));
#else
  for (int byte = 0; byte < 4; ++byte) sum += (w >> 8 * byte & 255) * (x << (24 - 8 * byte) >> 24);
  return sum;
#endif
}

constexpr int32_t kMostPlain = 255;
inline Int dot_plain(Int sum, Int w, Int x) { return dot<8>(sum, w, x); }

#endif
