// The memory layout of weights [n, k] that gemm_dense.cpp and gemm_wna16.cpp read: tiles of kTile of the n output
// columns, one after the other, [n / kTile, k, kTile]. In a stack of weights, the tiles of each weight follow those of
// the weight before.
#pragma once

#include <cstdint>

#include "vec.h"

constexpr int kTile = 32;  // `TILE` in library.py

inline int64_t num_tiles(int64_t columns) { return (columns + kTile - 1) / kTile; }

// How many numbers of a column are adjacent in a tile, [k / kDepth, kTile, kDepth]. Those of bfloat16 are stored in
// pairs, in the halves of a word, because instructions that multiply pairs need this order; one instruction converts a
// half to float32.
template <class W>
constexpr int64_t kDepth = 1;
template <>
constexpr int64_t kDepth<BFloat16> = 2;

// The number of inputs of a tile: k, or k + 1 where pairs need an even number. The weights of the added input are 0.
template <class W>
inline int64_t even_inputs(int64_t k) {
  return (k + kDepth<W> - 1) / kDepth<W> * kDepth<W>;
}

// The index of the weight of an input and a column within a tile.
template <class W>
inline int64_t place_in_tile(int64_t input, int64_t column) {
  return (input / kDepth<W> * kTile + column) * kDepth<W> + input % kDepth<W>;
}
