// The terms of sums of products: floats, pairs of bfloat16 numbers, which AVX-512 BF16 multiplies and adds in the time
// of one float, or groups of four bytes. Pairs lose little precision for keys and values stored in two bytes or less.
#pragma once

#include <type_traits>

#include "vec.h"

// Two adjacent numbers of a row, the first one in the lower half.
struct Pair {
  BFloat16 low, high;
};

// Four adjacent bytes of a row that has a scale.
struct Quad {
  int8_t codes[4];
};

// Inline, as functions that several sources use have it in their types.
#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

// The type of term for numbers of type T, how many numbers a term has, and of which type.
template <class T>
using TermOf = std::conditional_t<std::is_same_v<T, Int8>, Quad,
                                  std::conditional_t<kHasPairs && sizeof(T) <= 2, Pair, float>>;
template <class Term>
using Element = std::conditional_t<std::is_same_v<Term, Pair>, BFloat16,
                                   std::conditional_t<std::is_same_v<Term, Quad>, int8_t, float>>;
template <class Term>
constexpr int64_t kNumbers = sizeof(Term) / sizeof(Element<Term>);

inline Vec add_product(Vec sum, Vec column, const float* factor) { return sum + column * *factor; }

inline void store_element(float* p, Vec v) { store(p, v); }

#if defined(__AVX512BF16__)

inline Vec add_product(Vec sum, Int column, const Pair* factor) {
  return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(column),
                                        bit_cast<__m512bh>(_mm512_set1_epi32(read<int32_t>(factor)))));
}

// Subnormal numbers become 0, because the instructions that multiply pairs treat them as 0.
inline void store_element(BFloat16* p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
  std::memcpy(p, &rounded, sizeof rounded);
}

inline Int load(const Pair* p) { return read<Int>(p); }

inline void store(Pair* p, Int v) { std::memcpy(p, &v, sizeof v); }

// Numbers 0 .. 15 and 16 .. 31 side by side.
inline Int interleave(__m512i v) {
  using Shorts = int16_t __attribute__((vector_size(64)));
  constexpr Shorts kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bit_cast<Int>(_mm512_permutexvar_epi16(bit_cast<__m512i>(kOrder), v));
}

inline Int pairs_of(Vec low, Vec high) {
  return interleave(bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low))));
}

template <class T>
inline Int load_pairs(const T* low, const T* high) {
  return pairs_of(load(low), load(high));
}

template <>
inline Int load_pairs(const BFloat16* low, const BFloat16* high) {
  __m256i lower, upper;
  std::memcpy(&lower, low, sizeof lower);
  std::memcpy(&upper, high, sizeof upper);
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1));
}

#endif

// Loads a term for each lane: from one row of terms, or from as many rows of numbers as a term has numbers, which are
// `stride` apart.
template <class Term, class T>
inline auto load_terms(const T* rows, int64_t stride) {
  if constexpr (kNumbers<Term> == 1 || std::is_same_v<T, Term>) {
    return load(rows);
  } else {
    return load_pairs(rows, rows + stride);
  }
}
