// Attention of queries over one tile of keys and values. It is compiled once for each type of cache and used by both
// attention ops, because no other code takes longer to compile.
#pragma once

#include "matrix_unit.h"
#include "paged.h"

// Returns the number of floats that `attend` needs as scratch memory.
template <class T>
inline int64_t attend_scratch(int64_t dim) {
  if constexpr (std::is_same_v<T, Int8>) return kHasMatrixUnit ? dim * kTile<Quad> / 4 : 0;
  return 2 * dim * kTile<TermOf<T>> / kNumbers<TermOf<T>>;
}

// Attends to tokens first .. tile.size - 1 of a tile, except those that `mask` hides from a row. Other tokens, whose
// contents may be NaN, do not affect the results. A row's result does not depend on the other rows. `next` is the tile
// to prefetch meanwhile.
template <class T>
void attend(const PagedCache<T>& cache, const Tile<T>& tile, const Tile<T>& next, int64_t head, int64_t first,
            const Queries<TermOf<T>>& queries, const CausalMask& mask, float softcap, float* scratch);

template <>
void attend(const PagedCache<Int8>& cache, const Tile<Int8>& tile, const Tile<Int8>& next, int64_t head, int64_t first,
            const Queries<Quad>& queries, const CausalMask& mask, float softcap, float* scratch);
