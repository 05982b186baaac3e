// Vectors of floats of the machine's width, with the compiler's vector types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// An exported function returns this if it succeeds, and otherwise the index of the row that is invalid.
constexpr int64_t kDone = -1;

using Vec = float __attribute__((vector_size(kLanes * 4)));
using Int = int32_t __attribute__((vector_size(kLanes * 4)));
using UInt = uint32_t __attribute__((vector_size(kLanes * 4)));
using Half = uint16_t __attribute__((vector_size(kLanes * 2)));
using Byte = uint8_t __attribute__((vector_size(kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct E4M3 {
  uint8_t bits;
};
// Bytes whose values are relative to the scale of their row, see cache8.h.
struct Int8 {
  int8_t code;
};

// Element types with the numbers that the Python code uses (`library.CODES`).
enum Code : int64_t { kFloat32 = 0, kBFloat16 = 1, kE4M3 = 2, kFloat16 = 3, kInt8 = 4 };

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Loads a V from `p`, which need not be aligned.
template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec splat(float value) { return value - Vec{}; }  // not +, which compilers must compute: -0 + 0 is 0

// The larger ones of a and b; those of b where one of them is no number.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)  // compilers take two instructions for what else would be written
  return bit_cast<Vec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Vec load(const float* p) { return read<Vec>(p); }

inline Vec load(const BFloat16* p) {
  const Half h = read<Half>(p);
#if defined(__AVX512F__)
  // Written by hand, because compilers make this conversion of pieces, with five times the instructions.
  return bit_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)), 16));
#else
  return bit_cast<Vec>(__builtin_convertvector(h, UInt) << 16);
#endif
}

inline Vec load(const Float16* p) {
  const Half h = read<Half>(p);
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif defined(__AVX__) && defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  const UInt u = __builtin_convertvector(h, UInt), magnitude = u & 0x7fff;
  // Exponent and mantissa are moved to those of a float; the product mends the bias, of subnormal numbers, too.
  const UInt value = bit_cast<UInt>(bit_cast<Vec>(magnitude << 13) * 0x1p112f);
  const UInt special = bit_cast<UInt>(magnitude >= 0x7c00) & 0x7f800000u;  // infinity and NaN
  return bit_cast<Vec>(value | special | (u & 0x8000) << 16);
#endif
}

inline Vec load(const E4M3* p) {
  const Byte b = read<Byte>(p);
  const UInt u = __builtin_convertvector(b, UInt), magnitude = u & 0x7f;
  // Exponent and mantissa are moved to those of a float; the product mends the bias, of subnormal numbers, too.
  const Vec value = bit_cast<Vec>(magnitude << 20) * 0x1p120f;
  const UInt nan = bit_cast<UInt>(magnitude == 0x7f) & 0x7fc00000u;
  return bit_cast<Vec>(bit_cast<UInt>(value) | (u & 0x80) << 24 | nan);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(BFloat16* p, Vec v) {  // to the nearest, ties to even
  const UInt u = bit_cast<UInt>(v);
  const UInt rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const Half h = __builtin_convertvector(v == v ? rounded : (UInt{} + 0x7fc0u), Half);
  std::memcpy(p, &h, sizeof h);
}

inline void store(Float16* p, Vec v) {  // to the nearest, ties to even; infinity from 65520 on
#if defined(__AVX512F__)
  const Half h = bit_cast<Half>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX__) && defined(__F16C__)
  const Half h = bit_cast<Half>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const UInt u = bit_cast<UInt>(v), sign = u >> 16 & 0x8000, bits = u & 0x7fffffff;
  const Vec magnitude = bit_cast<Vec>(bits);
  // Below 2^-14 numbers are multiples of 2^-24, which the addition rounds to and leaves in the low bits.
  const UInt small = bit_cast<UInt>(magnitude + 0.5f) - bit_cast<UInt>(splat(0.5f));
  const UInt normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const UInt large = magnitude < 65520.0f ? normal : (UInt{} + 0x7c00u);
  const UInt code = v == v ? (magnitude < 0x1p-14f ? small : large) : (UInt{} + 0x7e00u);
  const Half h = __builtin_convertvector(code | sign, Half);
#endif
  std::memcpy(p, &h, sizeof h);
}

inline void store(E4M3* p, Vec v) {  // to the nearest, ties to even; at most 464 in magnitude
  const UInt u = bit_cast<UInt>(v), sign = u >> 24 & 0x80, bits = u & 0x7fffffff;
  const Vec magnitude = bit_cast<Vec>(bits);
  // Below 2^-6 numbers are multiples of 2^-9, which the addition rounds to and leaves in the low bits.
  const UInt small = bit_cast<UInt>(magnitude + 16384.0f) - bit_cast<UInt>(splat(16384.0f));
  const UInt normal = (bits - (120u << 23) + 0x7ffff + (bits >> 20 & 1)) >> 20;
  const UInt code = v == v ? (magnitude < 0x1p-6f ? small : normal) : (UInt{} + 0x7fu);
  const Byte b = __builtin_convertvector(code | sign, Byte);
  std::memcpy(p, &b, sizeof b);
}

// The first `count` < kLanes elements; the others are 0.
template <class T>
inline Vec load(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store(T* p, Vec v, int64_t count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// to [size] = from * factor, in the type of `to`; `to` and `from` may be the same array.
template <class From, class To>
inline void copy_scaled(const From* from, To* to, float factor, int64_t size) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) store(to + at, load(from + at) * factor);
  if (at < size) store(to + at, load(from + at, size - at) * factor, size - at);
}

// `v` rounded to type T and converted back.
template <class T>
inline Vec rounded_to(Vec v) {
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}

template <>
inline Vec rounded_to<float>(Vec v) {
  return v;
}

using Vec4 = float __attribute__((vector_size(16)));

// The sum of the lanes, down to four.
inline Vec4 quarter(Vec v) {
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  Vec4 total = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) total += parts[i];
  return total;
}

inline float sum(Vec v) {
  const Vec4 q = quarter(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

inline float maximum(Vec v) {
  Vec4 parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  Vec4 most = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) most = parts[i] > most ? parts[i] : most;
  const float left = most[0] > most[2] ? most[0] : most[2], right = most[1] > most[3] ? most[1] : most[3];
  return left > right ? left : right;
}

// e^x to 2 units in the last place; near 0 below the normal numbers, 0 below -104, finite above 88, NaN for NaN.
inline Vec exp(Vec x) {
#if defined(__AVX512F__)
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), bit_cast<__m512>(x)));
  const Vec bounded = bit_cast<Vec>(v);
  const Vec n = bit_cast<Vec>(_mm512_roundscale_ps(v * 1.44269504f, _MM_FROUND_TO_NEAREST_INT));
#else
  const Vec bounded = x > 88.0f ? splat(88.0f) : (x < -87.0f ? splat(-87.0f) : x);
  const Vec shifted = bounded * 1.44269504f + 12582912.0f;  // the addition leaves the integer in the low bits
  const Vec n = shifted - 12582912.0f;
#endif
  const Vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  const Vec scaled = bit_cast<Vec>(bit_cast<UInt>(p) + (bit_cast<UInt>(shifted) << 23));
  return x < -87.0f ? Vec{} : scaled;
#endif
}

inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

// Returns run(Q{}, T{}), the types of activations and of what the cache holds.
template <class Run>
int64_t with_types(int64_t dtype, int64_t cache_dtype, const Run& run) {
  const auto with_cache = [&](auto type) {
    if (cache_dtype == kFloat32) return run(type, float{});
    if (cache_dtype == kBFloat16) return run(type, BFloat16{});
    if (cache_dtype == kFloat16) return run(type, Float16{});
    if (cache_dtype == kInt8) return run(type, Int8{});
    return run(type, E4M3{});
  };
  return dtype == kFloat32 ? with_cache(float{}) : with_cache(BFloat16{});
}
