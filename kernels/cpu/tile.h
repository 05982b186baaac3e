// How the products of gemm_dense.cpp and gemm_wna16.cpp go through their operands.
//
// The order of weights [n, k] in memory: tiles of kTile of the n columns of a product, one behind the other,
// [n / kTile, k, kTile].
#pragma once

#include <cstdint>

#include "vec.h"

constexpr int kTile = 32;         // `TILE` in library.py
constexpr int kApart = kTile / 2;

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

// The rows of a product's input, in as few blocks of at most `most` rows as can be, of even sizes.
struct Blocks {
  int64_t rows, most, count;

  Blocks(int64_t rows, int64_t most) : rows(rows), most(most), count((rows + most - 1) / most) {}
  int64_t start(int64_t block) const { return rows * block / count; }
};
