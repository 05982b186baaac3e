// The order of weights [n, k] in memory, as gemm_dense.cpp and gemm_wna16.cpp read them: tiles of kTile of the n columns of a
// product, one behind the other, [n / kTile, k, kTile]. The tiles of a stack of weights lie one weight behind the other.
#pragma once

#include <cstdint>

#include "vec.h"

constexpr int kTile = 32;         // `TILE` in library.py
constexpr int kApart = kTile / 2;

inline int64_t num_tiles(int64_t columns) { return (columns + kTile - 1) / kTile; }

// Where a column of a tile is in a row of the tile. Columns of bfloat16 lie in pairs, kApart columns apart, in the two
// halves of a word: a half becomes float32 with one instruction.
template <class W>
constexpr int64_t place_in_tile(int64_t column) {
  return column;
}

template <>
constexpr int64_t place_in_tile<BFloat16>(int64_t column) {
  return column % kApart * 2 + column / kApart;
}
