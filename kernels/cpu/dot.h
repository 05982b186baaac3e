// Products of bytes, added up in 32 bits: the one thing that vec.h's vectors cannot say.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vec.h"

#if defined(__AVX512VNNI__)
constexpr bool kDotIsOneInstruction = true;  // on 32 registers
#else
constexpr bool kDotIsOneInstruction = false;
#endif

// `dot<Bits>` takes weights of 0 .. 2^Bits - 1 as if they were so much smaller.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
template <int Bits>
constexpr int32_t kCentre = 0;
#else
template <int Bits>
constexpr int32_t kCentre = Bits == 8 ? 128 : 0;
#endif

#if defined(__AVX2__) && !defined(__AVXVNNI__)
// Two products at a time are added in 16 bits, with saturation. Two of 15 * 127 fit, and two of 128 * 127, not of 255.
template <int Bits>
inline __m256i dot_256(__m256i sum, __m256i w, __m256i x) {
  if constexpr (Bits == 8) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    x = _mm256_sign_epi8(x, w);
    w = _mm256_abs_epi8(w);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#endif

// Every lane of `w` holds four weights and every lane of `x` four inputs, signed bytes of at least -127; the sum of
// their products is added to that lane of `sum`.
template <int Bits>
inline Int dot(Int sum, Int w, Int x) {
#if defined(__AVX512VNNI__)
  return bit_cast<Int>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
#elif defined(__AVX512F__) && defined(__AVX2__)
  struct Halves {
    __m256i half[2];
  };
  Halves s = bit_cast<Halves>(sum), ws = bit_cast<Halves>(w), xs = bit_cast<Halves>(x);
  for (int i = 0; i < 2; ++i) {
#if defined(__AVXVNNI__)
    s.half[i] = _mm256_dpbusd_avx_epi32(s.half[i], ws.half[i], xs.half[i]);
#else
    s.half[i] = dot_256<Bits>(s.half[i], ws.half[i], xs.half[i]);
#endif
  }
  return bit_cast<Int>(s);
#elif defined(__AVXVNNI__)
  return bit_cast<Int>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(w), bit_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return bit_cast<Int>(dot_256<Bits>(bit_cast<__m256i>(sum), bit_cast<__m256i>(w), bit_cast<__m256i>(x)));
#else
  for (int byte = 0; byte < 4; ++byte) sum += (w >> 8 * byte & 255) * (x << (24 - 8 * byte) >> 24);
  return sum;
#endif
}
