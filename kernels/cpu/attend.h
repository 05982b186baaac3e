// What queries and a tile of keys and values come to. It is compiled once for each type of cache and used by both
// attention ops, as no other code takes a compiler so long.
#pragma once

#include "matrix_unit.h"
#include "paged.h"

// Floats that `attend` needs for itself.
template <class T>
inline int64_t attend_scratch(int64_t dim) {
  if constexpr (std::is_same_v<T, Int8>) return kHasMatrixUnit ? dim * kTile<Quad> / 4 : 0;
  return 2 * dim * kTile<TermOf<T>> / kNumbers<TermOf<T>>;
}

// Attend to tokens first .. tile.size - 1 of a tile, of which `mask` hides what a row must not see. What stands in other
// tokens, which may be no numbers, has no part in the results. A row's result does not depend on the others. `next` is
// the tile that memory is asked for meanwhile.
template <class T>
void attend(const PagedCache<T>& cache, const Tile<T>& tile, const Tile<T>& next, int64_t head, int64_t first,
            const Queries<TermOf<T>>& queries, const CausalMask& mask, float softcap, float* scratch);

template <>
void attend(const PagedCache<Int8>& cache, const Tile<Int8>& tile, const Tile<Int8>& next, int64_t head, int64_t first,
            const Queries<Quad>& queries, const CausalMask& mask, float softcap, float* scratch);
