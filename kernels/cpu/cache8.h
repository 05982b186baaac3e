// Keys and values of 8 bits in the paged cache, a scale for each token and head.
//
// kPart tokens of a head lie side by side, [parts, heads, (dim + 4) * kPart] bytes: of keys [dim / 4, kPart, 4] codes,
// 128 larger than they are, of values [kPart / 4, dim, 4], and then the kPart scales. So either is multiplied as it
// lies in memory, four products per lane: the vectors of a product have a lane per token, or per number of a value.
#pragma once

#include "round8.h"

// Tokens that lie side by side: pages are multiples of it, and no vector is longer.
constexpr int64_t kPart = 16;

// Bytes that the cache has of a token and head.
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
