// The layout of 8-bit keys and values in the paged cache, with a scale for each token and head.
//
// kPart tokens of a head are stored together, [parts, heads, (dim + 4) * kPart] bytes. Keys have [dim / 4, kPart, 4]
// codes, to which 128 is added, values have [kPart / 4, dim, 4] codes; the kPart scales follow. So dot products read
// either directly from memory, four products per lane: a lane belongs to a token for keys, and to a number of the value
// vector for values.
#pragma once

#include "round8.h"

// The tokens that are stored together. Page sizes are multiples of it, and no vector has more lanes.
constexpr int64_t kPart = 16;

// The bytes of a token and head in the cache.
inline int64_t row_size8(int64_t dim) { return dim + sizeof(float); }

// Token `at` of a part takes its place there.
template <class T>
inline void write_key8(const T* key, int64_t dim, int64_t at, Int8* part) {
  const float scale = round_row8(key, dim, [&](int64_t i, Byte codes) {
    for (int four = 0; four < kLanes; four += 4, i += 4) {
      const uint32_t word = read<uint32_t>(reinterpret_cast<const char*>(&codes) + four) ^ 0x80808080;
      std::memcpy(part + i * kPart + at * 4, &word, sizeof word);
    }
  }).scale;
  std::memcpy(part + dim * kPart + at * sizeof scale, &scale, sizeof scale);
}

template <class T>
inline void write_value8(const T* value, int64_t dim, int64_t at, Int8* part) {
  Int8* to = part + at / 4 * 4 * dim + at % 4;
  const float scale = round_row8(value, dim, [&](int64_t i, Byte codes) {
    for (int lane = 0; lane < kLanes; ++lane) to[4 * (i + lane)].code = int8_t(codes[lane]);
  }).scale;
  std::memcpy(part + dim * kPart + at * sizeof scale, &scale, sizeof scale);
}
