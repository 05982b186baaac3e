// The instructions of AVX-512 (F, BW, VNNI, BF16), AVX-VNNI and AMX that the C++ kernels use, as plain functions with the
// names of the intrinsics, by Intel's manual. Found in place of the compiler's header, it lets the kernels' own sources
// for CPUs with these instructions run on any x86-64 with AVX2. What a CPU would answer with a fault ends the process.
//
// The macros __AVX512F__, ..., which say what a CPU has, are given on the command line; see test_cpu_emulated.py.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVX512BW__")
#pragma push_macro("__AVX512CD__")
#pragma push_macro("__AVX512DQ__")
#pragma push_macro("__AVX512VL__")
#pragma push_macro("__AVX512VNNI__")
#pragma push_macro("__AVX512BF16__")
#pragma push_macro("__AVXVNNI__")
#pragma push_macro("__AMX_TILE__")
#pragma push_macro("__AMX_BF16__")
#pragma push_macro("__AMX_INT8__")
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512CD__
#undef __AVX512DQ__
#undef __AVX512VL__
#undef __AVX512VNNI__
#undef __AVX512BF16__
#undef __AVXVNNI__
#undef __AMX_TILE__
#undef __AMX_BF16__
#undef __AMX_INT8__
#include_next <immintrin.h>
#pragma pop_macro("__AVX512F__")
#pragma pop_macro("__AVX512BW__")
#pragma pop_macro("__AVX512CD__")
#pragma pop_macro("__AVX512DQ__")
#pragma pop_macro("__AVX512VL__")
#pragma pop_macro("__AVX512VNNI__")
#pragma pop_macro("__AVX512BF16__")
#pragma pop_macro("__AVXVNNI__")
#pragma pop_macro("__AMX_TILE__")
#pragma pop_macro("__AMX_BF16__")
#pragma pop_macro("__AMX_INT8__")

namespace emulated {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Lanes {
  T at[64 / sizeof(T)];
};

// A vector whose lane i of type T is lane(i).
template <class V, class T, class Lane>
inline V made_of(const Lane& lane) {
  Lanes<T> lanes;
  for (int i = 0; i < int(64 / sizeof(T)); ++i) lanes.at[i] = lane(i);
  return as<V>(lanes);
}

template <class T, class V>
inline Lanes<T> lanes(const V& v) {
  return as<Lanes<T>>(v);
}

inline __m512i castsi256_si512(__m256i a) {
  const __m256i halves[2] = {a, a};  // the upper one is undefined
  return as<__m512i>(halves);
}

inline __m256i lower_half(__m512i a) {
  __m256i half;
  std::memcpy(&half, &a, sizeof half);
  return half;
}

inline __m512 set1_ps(float x) { return made_of<__m512, float>([&](int) { return x; }); }
inline __m512i set1_epi32(int32_t x) { return made_of<__m512i, int32_t>([&](int) { return x; }); }
inline __m512i set1_epi16(int16_t x) { return made_of<__m512i, int16_t>([&](int) { return x; }); }
inline __m512i setzero_si512() { return set1_epi32(0); }

inline __m512i slli_epi32(__m512i a, unsigned count) {
  const auto x = lanes<uint32_t>(a);
  return made_of<__m512i, uint32_t>([&](int i) { return x.at[i] << count; });
}

inline __m512i cvtepu16_epi32(__m256i a) {
  uint16_t x[16];
  std::memcpy(x, &a, sizeof x);
  return made_of<__m512i, uint32_t>([&](int i) { return uint32_t(x[i]); });
}

inline __m512 cvtph_ps(__m256i a) {
  __m128i halves[2];
  std::memcpy(halves, &a, sizeof halves);
  const __m256 wide[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  return as<__m512>(wide);
}

inline __m256i cvtps_ph(__m512 a, int) {
  __m256 halves[2];
  std::memcpy(halves, &a, sizeof halves);
  const __m128i narrow[2] = {_mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT)};
  return as<__m256i>(narrow);
}

inline __m512 max_ps(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return made_of<__m512, float>([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
}

inline __m512 min_ps(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return made_of<__m512, float>([&](int i) { return x.at[i] < y.at[i] ? x.at[i] : y.at[i]; });
}

inline __m512 roundscale_ps(__m512 a, int) {
  const auto x = lanes<float>(a);
  return made_of<__m512, float>([&](int i) { return std::nearbyint(x.at[i]); });
}

inline __m512 scalef_ps(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return made_of<__m512, float>([&](int i) {
    return std::ldexp(x.at[i], int(std::floor(std::fmin(std::fmax(y.at[i], -1000.0f), 1000.0f))));
  });
}

inline __m128i cvtepi32_epi8(__m512i a) {
  const auto x = lanes<int32_t>(a);
  uint8_t narrow[16];
  for (int i = 0; i < 16; ++i) narrow[i] = uint8_t(x.at[i]);
  return as<__m128i>(narrow);
}

// Less the whole number below it: the one way of rounding that is used.
inline __m512 reduce_ps(__m512 a, int way) {
  if (way != (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)) std::abort();
  const auto x = lanes<float>(a);
  return made_of<__m512, float>([&](int i) { return std::isinf(x.at[i]) ? 0.0f : x.at[i] - std::floor(x.at[i]); });
}

inline int16_t saturated(int32_t x) { return int16_t(x > 32767 ? 32767 : x < -32768 ? -32768 : x); }

inline __m512i maddubs_epi16(__m512i a, __m512i b) {
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  return made_of<__m512i, int16_t>(
      [&](int i) { return saturated(x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1]); });
}

inline __m512i madd_epi16(__m512i a, __m512i b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return made_of<__m512i, int32_t>(
      [&](int i) { return x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1]; });
}

inline __m512i abs_epi8(__m512i a) {
  const auto x = lanes<int8_t>(a);
  return made_of<__m512i, int8_t>([&](int i) { return int8_t(x.at[i] < 0 ? -x.at[i] : x.at[i]); });
}

inline uint64_t movepi8_mask(__m512i a) {
  const auto x = lanes<int8_t>(a);
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t(x.at[i] < 0) << i;
  return mask;
}

inline __m512i mask_sub_epi8(__m512i otherwise, uint64_t mask, __m512i a, __m512i b) {
  const auto z = lanes<int8_t>(otherwise), x = lanes<int8_t>(a), y = lanes<int8_t>(b);
  return made_of<__m512i, int8_t>([&](int i) { return mask >> i & 1 ? int8_t(x.at[i] - y.at[i]) : z.at[i]; });
}

inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto s = lanes<int32_t>(sum);
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  return made_of<__m512i, int32_t>([&](int i) {
    int32_t total = s.at[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += x.at[j] * y.at[j];
    return total;
  });
}

inline __m256i dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  return lower_half(dpbusd_epi32(castsi256_si512(sum), castsi256_si512(a), castsi256_si512(b)));
}

// Products of bfloat16 take subnormal numbers for 0 and make none.
inline float without_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float widened_bf16(uint16_t bits) { return without_subnormal(as<float>(uint32_t(bits) << 16)); }
inline float add_product_bf16(float sum, uint16_t a, uint16_t b) {
  return without_subnormal(std::fma(widened_bf16(a), widened_bf16(b), sum));
}

inline uint16_t narrowed_bf16(float x) {
  const uint32_t bits = as<uint32_t>(without_subnormal(x));
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto s = lanes<float>(sum);
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  return made_of<__m512, float>([&](int i) {
    const float odd = add_product_bf16(without_subnormal(s.at[i]), x.at[2 * i + 1], y.at[2 * i + 1]);
    return add_product_bf16(odd, x.at[2 * i], y.at[2 * i]);
  });
}

inline __m256bh cvtneps_pbh(__m512 a) {
  const auto x = lanes<float>(a);
  uint16_t narrow[16];
  for (int i = 0; i < 16; ++i) narrow[i] = narrowed_bf16(x.at[i]);
  return as<__m256bh>(narrow);
}

// The lower half is of `b`.
inline __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
  const __m256bh halves[2] = {cvtneps_pbh(b), cvtneps_pbh(a)};
  return as<__m512bh>(halves);
}

inline __m512i permutexvar_epi16(__m512i order, __m512i a) {
  const auto places = lanes<uint16_t>(order), x = lanes<uint16_t>(a);
  return made_of<__m512i, uint16_t>([&](int i) { return x.at[places.at[i] & 31]; });
}

inline __m512i inserti64x4(__m512i a, __m256i b, int half) {
  __m256i halves[2];
  std::memcpy(halves, &a, sizeof halves);
  halves[half] = b;
  return as<__m512i>(halves);
}

// AMX: eight tiles of 16 rows of 64 bytes. `rows`, and `bytes` of a row, are configured; the others are 0.
struct Tiles {
  bool are_configured = false;
  int rows[8] = {}, bytes[8] = {};
  uint8_t data[8][16][64] = {};
};
inline thread_local Tiles tiles;

inline void fault_unless(bool is_allowed) {
  if (!is_allowed) std::abort();
}

inline void check_tile(int tile) {
  fault_unless(tiles.are_configured && tile < 8 && tiles.rows[tile] > 0 && tiles.bytes[tile] > 0);
}

inline void tile_loadconfig(const void* at) {
  const auto* c = static_cast<const uint8_t*>(at);
  tiles = Tiles();
  fault_unless(c[0] == 1 && c[1] == 0);
  for (int i = 2; i < 16; ++i) fault_unless(c[i] == 0);
  for (int tile = 0; tile < 16; ++tile) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * tile, 2);
    const int rows = c[48 + tile];
    fault_unless(bytes <= 64 && rows <= 16 && (bytes == 0) == (rows == 0) && (tile < 8 || rows == 0));
    if (tile < 8) tiles.rows[tile] = rows, tiles.bytes[tile] = bytes;
  }
  tiles.are_configured = true;
}

inline void tile_release() { tiles = Tiles(); }

inline void tile_zero(int tile) {
  check_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void tile_loadd(int tile, const void* base, int64_t stride) {
  tile_zero(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(tiles.data[tile][row], static_cast<const char*>(base) + row * stride, tiles.bytes[tile]);
  }
}

inline void tile_stored(int tile, void* base, int64_t stride) {
  check_tile(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
  }
}

// Calls add(sum, words of a's row, words of b's column, `apart` bytes from each other, count) for each sum.
template <class Sum, class Add>
inline void tile_product(int c, int a, int b, const Add& add) {
  for (const int tile : {c, a, b}) check_tile(tile);
  fault_unless(c != a && c != b && a != b && tiles.rows[c] == tiles.rows[a] && tiles.bytes[c] == tiles.bytes[b]);
  fault_unless(tiles.bytes[a] == 4 * tiles.rows[b] && tiles.bytes[c] % 4 == 0);
  for (int row = 0; row < tiles.rows[c]; ++row) {
    for (int column = 0; column < tiles.bytes[c] / 4; ++column) {
      Sum sum;
      std::memcpy(&sum, &tiles.data[c][row][4 * column], 4);
      sum = add(sum, tiles.data[a][row], &tiles.data[b][0][4 * column], tiles.rows[b]);
      std::memcpy(&tiles.data[c][row][4 * column], &sum, 4);
    }
  }
}

inline void tile_dpbf16ps(int c, int a, int b) {
  tile_product<float>(c, a, b, [](float sum, const uint8_t* row, const uint8_t* column, int words) {
    float even = 0, odd = 0;
    for (int i = 0; i < words; ++i) {
      uint16_t x[2], y[2];
      std::memcpy(x, row + 4 * i, 4);
      std::memcpy(y, column + 64 * i, 4);
      even = add_product_bf16(even, x[0], y[0]);
      odd = add_product_bf16(odd, x[1], y[1]);
    }
    return without_subnormal(without_subnormal(sum) + without_subnormal(even + odd));
  });
}

// Adds up products of bytes, X of rows and W of columns.
template <class X, class W>
inline void tile_product_of_bytes(int c, int a, int b) {
  tile_product<int32_t>(c, a, b, [](int32_t sum, const uint8_t* row, const uint8_t* column, int words) {
    for (int i = 0; i < words; ++i) {
      for (int j = 0; j < 4; ++j) sum += X(row[4 * i + j]) * W(column[64 * i + j]);
    }
    return sum;
  });
}

// With EMULATE_WRONG_WEIGHTS or EMULATE_WRONG_INPUTS bytes that should be unsigned are signed: instructions that do not
// what their names say.
inline void tile_dpbsud(int c, int a, int b) {
#if defined(EMULATE_WRONG_WEIGHTS)
  tile_product_of_bytes<int8_t, int8_t>(c, a, b);
#else
  tile_product_of_bytes<int8_t, uint8_t>(c, a, b);
#endif
}

inline void tile_dpbusd(int c, int a, int b) {
#if defined(EMULATE_WRONG_INPUTS)
  tile_product_of_bytes<int8_t, int8_t>(c, a, b);
#else
  tile_product_of_bytes<uint8_t, int8_t>(c, a, b);
#endif
}

// Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
inline long system_call(long, long code, long feature) {
#if defined(EMULATE_NO_STATE)
  return -1;
#else
  return code == 0x1023 && feature == 18 ? 0 : -1;
#endif
}

}  // namespace emulated

#undef _mm512_cvtps_ph
#undef _mm512_inserti64x4
#undef _mm512_reduce_ps
#undef _mm512_roundscale_ps
#undef _mm512_slli_epi32
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_avx_epi32
#define _mm512_abs_epi8 emulated::abs_epi8
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_mask_sub_epi8 emulated::mask_sub_epi8
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_movepi8_mask emulated::movepi8_mask
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_reduce_ps emulated::reduce_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_slli_epi32 emulated::slli_epi32
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _tile_dpbsud emulated::tile_dpbsud
#define _tile_dpbusd emulated::tile_dpbusd
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_loadd emulated::tile_loadd
#define _tile_release emulated::tile_release
#define _tile_stored emulated::tile_stored
#define _tile_zero emulated::tile_zero
#define syscall emulated::system_call
