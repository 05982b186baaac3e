// Attention over 8-bit keys and values. Queries and attention weights are rounded to 8 bits as well, so that sums are
// exact.
#include "attend.h"
#include "dot.h"

namespace {

constexpr int64_t kTokens = Tile<Int8>::kMost, kParts = Tile<Int8>::kParts;
static_assert(kStep % (kBlockVecs * kLanes) == 0);

// Computes kCount rows of scores for kBlockVecs vectors of tokens; the keys of vector n begin at keys[n]. With kAsk it
// prefetches the same places of the next tile, `ahead`.
template <int kCount, bool kAsk>
inline void score_block(const Quad* q, int64_t dim, const Int8* const (&keys)[kBlockVecs],
                        const Int8* const (&ahead)[kBlockVecs], float* scores) {
  const int64_t fours = dim / 4, size = query_size<Quad>(dim);
  Int sum[kCount][kBlockVecs];
  for (int r = 0; r < kCount; ++r) {
    for (int n = 0; n < kBlockVecs; ++n) sum[r][n] = splat_four(q + r * size + fours + 1);
  }
  const auto ask = [&](int64_t i) {
    for (int n = 0; kAsk && n < kBlockVecs; n += 16 / kLanes) __builtin_prefetch(ahead[n] + i * 4 * kPart, 0, 2);
  };
  for (int64_t i = 0; i < fours; ++i) {
    Int codes[kBlockVecs];
    for (int n = 0; n < kBlockVecs; ++n) codes[n] = read<Int>(keys[n] + i * 4 * kPart);
    ask(i);
    for (int r = 0; r < kCount; ++r) {
      const Int four = splat_four(q + r * size + i);
      for (int n = 0; n < kBlockVecs; ++n) sum[r][n] = dot<8>(sum[r][n], codes[n], four);
    }
  }
  ask(fours);
  for (int n = 0; n < kBlockVecs; ++n) {
    const Vec scale = read<Vec>(keys[n] + dim * kPart);
    for (int r = 0; r < kCount; ++r) {
      const Vec product = __builtin_convertvector(sum[r][n], Vec);
      store(scores + r * kTokens + n * kLanes, product * (scale * read<float>(q + r * size + fours)));
    }
  }
}

// e^(score - largest) for scores of at most `largest`, with a relative error below 1e-4, which is less than rounding to
// 8 bits adds.
inline Vec rough_weight(Vec score, float largest) {
#if defined(__AVX512DQ__)
  constexpr float kLog2E = 1.44269504f;
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec x = score * kLog2E + splat(largest * -kLog2E);
  const Vec r = bit_cast<Vec>(_mm512_reduce_ps(bit_cast<__m512>(x), kDown));  // x - floor(x)
  const Vec p = ((r * 7.802452e-2f + 2.2606716e-1f) * r + 6.9583356e-1f) * r + 9.999252e-1f;  // 2^r to 7.5e-5
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(x)));
#else
  return exp(score - largest);
#endif
}

// Replaces a row's first `num_scores` scores with 8-bit weights, each multiplied by the scale of its value; the float
// after them is the scale of these weights. Returns the sum of the weights before rounding. scales[part] are the scales
// of the values of a part.
inline float weigh_row8(float* row, float largest, int64_t num_scores, const Int8* const (&scales)[kParts]) {
  Vec weights[kTokens / kLanes], total = {};
  UInt bound = {};
  for (int64_t step = 0; step < num_scores; step += kStep) {
    for (int64_t t = step; t < step + kStep; t += kLanes) {
      const Vec weight = rough_weight(load(row + t), largest);
      const Vec scale = read<Vec>(scales[t / kPart] + t % kPart * 4);
      const Vec product = weight == 0.0f ? Vec{} : weight * scale;  // the scale of an unused slot may be NaN
      weights[t / kLanes] = product;
      bound = larger(bound, bit_cast<UInt>(product));  // not negative, but possibly a NaN of either sign
      total += weight;
    }
  }
  const float most = largest_of(bit_cast<Int>(bound) & 0x7fffffff);
  const float inverse = most > 1e-30f ? kMostPlain / most : 0.0f;
  auto* codes = reinterpret_cast<uint8_t*>(row);
  for (int64_t step = 0; step < num_scores; step += kStep) {
    for (int64_t t = step; t < step + kStep; t += kLanes) {
      const Byte narrow = round_to_bytes(weights[t / kLanes], inverse);
      std::memcpy(codes + t, &narrow, sizeof narrow);
    }
  }
  row[num_scores / 4] = most * (1.0f / kMostPlain);
  return sum(total);
}

// Adds the values of a tile, multiplied by their weights, to kVecs vectors of each row of acc [kCount, dim]. `values`
// and `ahead` point to the beginning of those vectors in each part of this tile and of the next one.
template <int kCount, int kVecs, bool kAsk>
inline void add_values_block(const float* weights, const Tile<Int8>& tile, int64_t dim,
                             const Int8* const (&values)[kParts], const Int8* const (&ahead)[kParts], float* acc) {
  Int sum[kCount][kVecs] = {};
  for (int64_t t = 0; t < tile.size; t += 4) {
    const int64_t at = t % kPart * dim;
    Int codes[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      codes[n] = read<Int>(values[t / kPart] + at + n * 4 * kLanes);
      if (kAsk && n * kLanes % 16 == 0) __builtin_prefetch(ahead[t / kPart] + at + n * 4 * kLanes, 0, 2);
    }
    for (int r = 0; r < kCount; ++r) {
      const Int four = splat_four(reinterpret_cast<const uint8_t*>(weights + r * kTokens) + t);
      for (int n = 0; n < kVecs; ++n) sum[r][n] = dot_plain(sum[r][n], four, codes[n]);
    }
  }
  for (int r = 0; r < kCount; ++r) {
    const float factor = weights[r * kTokens + tile.num_scores() / 4];
    for (int n = 0; n < kVecs; ++n) {
      float* to = acc + r * dim + n * kLanes;
      store(to, load(to) + __builtin_convertvector(sum[r][n], Vec) * factor);
    }
  }
}

template <bool kAsk>
inline void score8(const PagedCache<Int8>& cache, const Tile<Int8>& tile, const Tile<Int8>& next, int64_t head_at,
                   const Queries<Quad>& queries) {
  for (int64_t t = 0; t < tile.num_scores(); t += kBlockVecs * kLanes) {
    const Int8 *keys[kBlockVecs], *ahead[kBlockVecs];
    for (int n = 0; n < kBlockVecs; ++n) {
      const int64_t token = t + n * kLanes, at = head_at + token % kPart * 4;
      keys[n] = tile.k[token / kPart] + at;
      ahead[n] = next.k[token / kPart] + at;
    }
    by_blocks(queries.count, [&](auto count, int64_t r) __attribute__((always_inline)) {
      score_block<count, kAsk>(queries.q + r * query_size<Quad>(cache.dim), cache.dim, keys, ahead,
                               queries.scores + r * kTokens + t);
    });
  }
}

template <int kVecs, bool kAsk>
inline void add_some_values8(const PagedCache<Int8>& cache, const Tile<Int8>& tile, const Tile<Int8>& next,
                             int64_t head_at, int64_t d, const Queries<Quad>& queries) {
  const Int8 *values[kParts], *ahead[kParts];
  for (int64_t part = 0; part < kParts; ++part) {
    values[part] = tile.v[part] + head_at + d * 4;
    ahead[part] = next.v[part] + head_at + d * 4;
  }
  by_blocks(queries.count, [&](auto count, int64_t r) __attribute__((always_inline)) {
    add_values_block<count, kVecs, kAsk>(queries.scores + r * kTokens, tile, cache.dim, values, ahead,
                                         queries.acc + r * cache.dim + d);
  });
}

template <bool kAsk>
inline void add_values8(const PagedCache<Int8>& cache, const Tile<Int8>& tile, const Tile<Int8>& next, int64_t head_at,
                        const Queries<Quad>& queries) {
  int64_t d = 0;
  for (; d + kBlockVecs * kLanes <= cache.dim; d += kBlockVecs * kLanes) {
    add_some_values8<kBlockVecs, kAsk>(cache, tile, next, head_at, d, queries);
  }
  for (; d < cache.dim; d += kLanes) add_some_values8<1, kAsk>(cache, tile, next, head_at, d, queries);
}

#if defined(HAS_MATRIX_UNIT)

static_assert(kLanes == kPart && 2 * kPart == kUnitColumns && kStep == 4 * kUnitWords);

// Returns the largest number of words per `add` that divides the words of a query.
inline int words_at_once(int64_t words) {
  int most = kUnitWords;
  while (words % most != 0) --most;
  return most;
}

// Calls block(first, count) for blocks of up to kUnitRows rows.
template <class Block>
inline void by_unit_blocks(int64_t rows, const Block& block) {
  for (int64_t r = 0; r < rows; r += kUnitRows) block(r, std::min<int64_t>(kUnitRows, rows - r));
}

// `score8` on the matrix unit. The scores are the same, bit by bit, because sums of bytes are exact.
void score_on_unit(MatrixUnit& unit, const PagedCache<Int8>& cache, const Tile<Int8>& tile, int64_t head_at,
                   const Queries<Quad>& queries) {
  constexpr int64_t kWord = 4 * kPart;  // bytes of a word of the keys of a part
  const int64_t fours = cache.dim / 4, size = query_size<Quad>(cache.dim);
  const int words = words_at_once(fours);
  alignas(64) int32_t sums[kUnitRows * kUnitColumns];
  for (int64_t t = 0; t < tile.num_scores(); t += kUnitColumns) {
    const Int8* const keys[] = {tile.k[t / kPart] + head_at, tile.k[t / kPart + 1] + head_at};
    const Vec scales[] = {read<Vec>(keys[0] + cache.dim * kPart), read<Vec>(keys[1] + cache.dim * kPart)};
    by_unit_blocks(queries.count, [&](int64_t first, int64_t count) {
      const Quad* q = queries.q + first * size;
      unit.begin(int(count), words);
      for (int64_t i = 0; i < fours; i += words) {
        unit.add<int8_t, uint8_t>(q + i, size * sizeof *q, keys[0] + i * kWord, keys[1] + i * kWord, kWord);
      }
      unit.store_sums(sums);
      for (int64_t r = 0; r < count; ++r, q += size) {
        const Int start = splat_four(q + fours + 1);
        for (int n = 0; n < 2; ++n) {
          const Int sum = read<Int>(sums + r * kUnitColumns + n * kLanes) + start;
          store(queries.scores + (first + r) * kTokens + t + n * kLanes,
                __builtin_convertvector(sum, Vec) * (scales[n] * read<float>(q + fours)));
        }
      }
    });
  }
}

// `add_values8` on the matrix unit. The values of all parts are first copied to one array, [tokens / 4, dim, 4], so
// that one instruction multiplies those of kStep tokens. Tokens after the last one of the tile have weights of 0.
void add_values_on_unit(MatrixUnit& unit, const PagedCache<Int8>& cache, const Tile<Int8>& tile, int64_t head_at,
                        const Queries<Quad>& queries, float* scratch) {
  const int64_t dim = cache.dim;
  auto* together = reinterpret_cast<Int8*>(scratch);
  for (int64_t part = 0; part < tile.num_scores() / kPart; ++part) {
    std::memcpy(together + part * kPart * dim, tile.v[part] + head_at, kPart * dim);
  }
  alignas(64) int32_t sums[kUnitRows * kUnitColumns];
  for (int64_t d = 0; d < dim; d += kUnitColumns) {
    const Int8* values = together + d * 4;
    by_unit_blocks(queries.count, [&](int64_t first, int64_t count) {
      const float* weights = queries.scores + first * kTokens;
      unit.begin(int(count), kUnitWords);
      for (int64_t t = 0; t < tile.num_scores(); t += kStep) {
        const Int8* of_step = values + t * dim;
        unit.add<uint8_t, int8_t>(weights + t / 4, kTokens * sizeof *weights, of_step, of_step + 4 * kLanes, 4 * dim);
      }
      unit.store_sums(sums);
      for (int64_t r = 0; r < count; ++r) {
        const float factor = weights[r * kTokens + tile.num_scores() / 4];
        for (int n = 0; n < 2; ++n) {
          float* to = queries.acc + (first + r) * dim + d + n * kLanes;
          const Int sum = read<Int>(sums + r * kUnitColumns + n * kLanes);
          store(to, load(to) + __builtin_convertvector(sum, Vec) * factor);
        }
      }
    });
  }
}

#endif

}  // namespace

// The cache's bytes are multiplied where they are. The contents of tokens that the tile does not have are undefined,
// but their weights are 0, and any integer times 0 is 0.
template <>
void attend(const PagedCache<Int8>& cache, const Tile<Int8>& tile, const Tile<Int8>& next, int64_t head, int64_t first,
            const Queries<Quad>& queries, const CausalMask& mask, float softcap, [[maybe_unused]] float* scratch) {
  const int64_t dim = cache.dim, head_at = head * row_size8(dim) * kPart;
  const Int8* scales[kParts];
  for (int64_t part = 0; part < kParts; ++part) scales[part] = tile.v[part] + head_at + dim * kPart;
  const auto take_weights = [&] {
    queries.take_weights(tile, first, dim, mask, softcap, [&](float* row, float largest) {
      return weigh_row8(row, largest, tile.num_scores(), scales);
    });
  };
  if (queries.count <= kBlockRows) {
    score8<true>(cache, tile, next, head_at, queries);
    take_weights();
    add_values8<true>(cache, tile, next, head_at, queries);
    next.prefetch_keys(cache, head, tile.num_scores());
    next.prefetch_values(cache, head, tile.size);
    return;
  }
#if defined(HAS_MATRIX_UNIT)
  if (queries.count >= kUnitLeastRows && dim % kUnitColumns == 0) {
    MatrixUnit unit;
    score_on_unit(unit, cache, tile, head_at, queries);
    take_weights();
    add_values_on_unit(unit, cache, tile, head_at, queries, scratch);
  } else
#endif
  {
    score8<false>(cache, tile, next, head_at, queries);
    take_weights();
    add_values8<false>(cache, tile, next, head_at, queries);
  }
  next.prefetch_keys(cache, head, 0);
  next.prefetch_values(cache, head, 0);
}
