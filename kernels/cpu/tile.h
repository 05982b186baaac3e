// The order of weights [n, k] in memory, as gemm_dense.cpp and gemm_wna16.cpp read them: tiles of kTile of the n columns of a
// product, one behind the other, [n / kTile, k, kTile]. The tiles of a stack of weights lie one weight behind the other.
#pragma once

#include <cstdint>

#include "vec.h"

constexpr int kTile = 32;  // `TILE` in library.py

inline int64_t num_tiles(int64_t columns) { return (columns + kTile - 1) / kTile; }

// How many numbers of a column lie side by side in a tile, [k / kDepth, kTile, kDepth]: those of bfloat16 lie in pairs,
// in the halves of a word, as products of pairs want them; a half becomes float32 with one instruction.
template <class W>
constexpr int64_t kDepth = 1;
template <>
constexpr int64_t kDepth<BFloat16> = 2;

// The inputs of a tile, of which there is one more where pairs want it; its weights are 0.
template <class W>
inline int64_t even_inputs(int64_t k) {
  return (k + kDepth<W> - 1) / kDepth<W> * kDepth<W>;
}

// Where the weight of an input and a column is in a tile.
template <class W>
inline int64_t place_in_tile(int64_t input, int64_t column) {
  return (input / kDepth<W> * kTile + column) * kDepth<W> + input % kDepth<W>;
}
