// The paged KV cache, and what both attention ops do with a tile of its tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "dot.h"
#include "multiply.h"
#include "cache8.h"

// The number of keys that are summed separately, so that threads can share a long sequence and a common prefix is
// computed once. A row's result depends on its sequence alone, so that prefill and decode steps give the same result.
constexpr int64_t kShare = 256;
// The number of tokens of a tile. After each tile a row's running maximum is updated and its earlier sums are rescaled.
// Keys and values that are rearranged to terms should stay in the core's first-level cache. Bytes are read where they
// are: with AVX-512 longer tiles are faster, because that update costs the same for any number of tokens. With AVX2
// they are slower, because its shorter vectors read the values in several passes.
template <class Term>
constexpr int64_t kTile = 64;
template <>
constexpr int64_t kTile<Quad> = kLanes == 16 ? kShare : 64;
// Scores are computed for the tokens of a tile, rounded up to a multiple of this number.
constexpr int64_t kStep = 64;
// Rows (queries of one head) that are multiplied with a tile together: enough to pay for rearranging its keys.
constexpr int64_t kRows = 96;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Keys are [num_blocks, heads, dim, page], so that one number of a query is multiplied with whole vectors of keys;
// values are [num_blocks, page, heads, dim]. The block table [S, max_blocks] has the blocks of each sequence; its rows
// are table_stride apart. Keys and values of 8 bits have the layout that cache8.h describes.
template <class T>
struct PagedCache {
  const T *k, *v;
  const int32_t* block_table;
  int64_t max_blocks, table_stride, num_blocks, page, heads, dim;

  // The number of elements of a token, all heads together.
  int64_t width() const { return heads * (std::is_same_v<T, Int8> ? row_size8(dim) : dim); }
};

// Pointers to the keys and values of up to kMost consecutive tokens, for all heads. Parts without a requested token
// point to a part with one, so that other blocks, whose contents are unknown, are never read.
template <class T>
struct Tile {
  static constexpr int64_t kMost = kTile<TermOf<T>>;
  static constexpr int64_t kParts = kMost / kPart;

  const T* k[kParts];
  const T* v[kParts];
  int64_t size;  // tokens

  // The number of tokens for which scores are computed.
  int64_t num_scores() const { return (size + kStep - 1) / kStep * kStep; }

  // Finds tokens first .. end - 1 in the tile that starts at `begin`, a multiple of kMost, so that a row has the same
  // tiles in any batch. Returns false when the table contains an invalid block.
  bool find(const PagedCache<T>& cache, int64_t sequence, int64_t begin, int64_t first, int64_t end) {
    size = std::min(end - begin, kMost);
    const int32_t* blocks = cache.block_table + sequence * cache.table_stride;
    const int64_t width = cache.width();
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = begin + part * kPart;
      const bool is_asked_for = at < end && at + kPart > first;
      const int64_t position = is_asked_for ? at : std::max(begin, first / kPart * kPart);
      const int64_t block = position / cache.page, offset = position % cache.page;
      if (block >= cache.max_blocks || blocks[block] < 0 || blocks[block] >= cache.num_blocks) return false;
      const int64_t slot = int64_t(blocks[block]) * cache.page;
      k[part] = cache.k + (std::is_same_v<T, Int8> ? (slot + offset) * width : slot * width + offset);
      v[part] = cache.v + (slot + offset) * width;
    }
    return true;
  }

  // Prefetch the keys and the values of a head, for tokens from `begin` on, a multiple of kPart.
  void prefetch_keys(const PagedCache<T>& cache, int64_t head, int64_t begin) const {
    if constexpr (std::is_same_v<T, Int8>) return prefetch_parts(k, cache, head, begin);
    const int64_t step = std::max<int64_t>(1, 64 / (cache.page * sizeof(T)));
    for (int64_t t = begin; t < size; t += kPart) {
      for (int64_t d = head * cache.dim; d < (head + 1) * cache.dim; d += step) ask_for(k[t / kPart] + d * cache.page);
    }
  }

  void prefetch_values(const PagedCache<T>& cache, int64_t head, int64_t begin) const {
    if constexpr (std::is_same_v<T, Int8>) return prefetch_parts(v, cache, head, begin);
    for (int64_t t = begin; t < size; ++t) {
      const T* row = v[t / kPart] + (t % kPart * cache.heads + head) * cache.dim;
      for (int64_t d = 0; d < cache.dim; d += 64 / int64_t(sizeof(T))) ask_for(row + d);
    }
  }

 private:
  void prefetch_parts(const T* const* parts, const PagedCache<T>& cache, int64_t head, int64_t begin) const {
    const int64_t bytes = row_size8(cache.dim) * kPart;
    for (int64_t part = (begin + kPart - 1) / kPart; part * kPart < size; ++part) {
      for (int64_t at = 0; at < bytes; at += 64) ask_for(parts[part] + head * bytes + at);
    }
  }

  static void ask_for(const void* p) { __builtin_prefetch(p, 0, 2); }
};

// The state of the running softmax of a row of scores: largest score and sum of weights so far.
struct Softmax {
  float largest = kMasked;
  float total = 0;
};

// Converts the first num_scores of scores [count, kTile] to weights relative to the largest score of their row, by
// `weigh(row, largest)`, which returns the sum of the weights, and adds them to the rows' softmaxes. shrunk [count]
// receives the factors by which earlier weights have to be multiplied. `count` is at most kLanes; the computations of
// several rows overlap.
template <class Term, class Weigh>
inline void add_scores(Softmax* rows, int64_t count, float* scores, int64_t num_scores, float softcap, float* shrunk,
                       const Weigh& weigh) {
  float before[kLanes] = {}, largest[kLanes] = {}, factors[kLanes];
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * kTile<Term>;
    Vec most = splat(rows[r].largest);
    for (int64_t i = 0; i < num_scores; i += kLanes) {
      Vec score = load(row + i);
      if (softcap != 0) {
        score = score == kMasked ? score : tanh(score / softcap) * softcap;
        store(row + i, score);
      }
      most = max(score, most);
    }
    before[r] = rows[r].largest;
    largest[r] = maximum(most);
  }
  const Vec was = load(before), is = load(largest);
  store(factors, was == is || was == kMasked ? splat(1) : exp(was - is));  // there is nothing to shrink yet
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * kTile<Term>;
    shrunk[r] = factors[r];
    if (largest[r] == kMasked) {  // all scores so far are masked
      std::fill(row, row + num_scores, 0.0f);
      continue;
    }
    rows[r] = {largest[r], rows[r].total * factors[r] + weigh(row, largest[r])};
  }
}

// Overwrites the scores of a row with weights, as elements of terms. Returns the sum of the weights.
template <class Term>
inline float weigh_row(float* row, float largest) {
  Vec weights = {};
  auto* elements = reinterpret_cast<Element<Term>*>(row);  // never ahead of the scores that are still to be read
  for (int64_t i = 0; i < kTile<Term>; i += kLanes) {
    const Vec weight = exp(load(row + i) - largest);
    weights += weight;
    store_element(elements + i, weight);
  }
  return sum(weights);
}

// Merges the result of the next share, a softmax and values [dim], into the result of the shares before it. Before the
// first share `acc` is undefined.
inline void merge(Softmax& into, float* acc, const Softmax& share, const float* values, int64_t dim) {
  if (share.largest == kMasked) return;
  if (into.largest == kMasked) {
    into = share;
    std::copy(values, values + dim, acc);
    return;
  }
  const float largest = std::max(into.largest, share.largest);
  const Vec factors = exp(Vec{into.largest - largest, share.largest - largest});
  const float shrunk = factors[0], weight = factors[1];
  for (int64_t d = 0; d < dim; d += kLanes) store(acc + d, load(acc + d) * shrunk + load(values + d) * weight);
  into = {largest, into.total * shrunk + share.total * weight};
}

// The number of terms of a scaled query: its numbers and, for bytes, also the factor of the products and the initial
// sum.
template <class Term>
inline int64_t query_size(int64_t dim) {
  return dim / kNumbers<Term> + (std::is_same_v<Term, Quad> ? 2 : 0);
}

template <class Q, class Term>
inline void load_query(const Q* q, Term* to, float scale, int64_t dim) {
  if constexpr (std::is_same_v<Term, Quad>) {
    const RoundedRow rounded = round_row8(q, dim, [&](int64_t i, Byte codes) {
      std::memcpy(to->codes + i, &codes, sizeof codes);
    });
    const float factor = rounded.scale * scale;
    const int32_t start = (kCentre<8> - 128) * rounded.sum;
    std::memcpy(to + dim / 4, &factor, sizeof factor);
    std::memcpy(to + dim / 4 + 1, &start, sizeof start);
  } else {
    copy_scaled(q, reinterpret_cast<Element<Term>*>(to), scale, dim);
  }
}

// Masks keys after a query and keys that have left its window. `position` is the position of the first query in a tile
// of `size` keys; every `group` rows share a position. A group of 0 masks nothing, for the queries of a decode step.
struct CausalMask {
  int64_t position, group, window, size;

  void operator()(int64_t r, float* row, int64_t num_scores) const {
    if (group == 0) return;
    const int64_t at = position + r / group, live = std::clamp<int64_t>(at + 1, 0, size);
    const int64_t left = window > 0 ? std::clamp<int64_t>(at - window + 1, 0, live) : 0;
    std::fill(row, row + left, kMasked);
    std::fill(row + live, row + num_scores, kMasked);
  }
};

// Queries of one head while they are multiplied with the keys, tile by tile: scaled queries [count, query_size], scores
// [count, kTile], and the results so far, a softmax and the values [count, dim], not yet divided by its total.
template <class Term>
struct Queries {
  const Term* q;
  float* scores;
  Softmax* softmax;
  float* acc;
  int64_t count;

  // Converts the scores of tokens first .. tile.size - 1 that are not masked to weights, by `weigh`, and rescales the
  // earlier sums to the new largest score.
  template <class T, class Weigh>
  void take_weights(const Tile<T>& tile, int64_t first, int64_t dim, const CausalMask& mask, float softcap,
                    const Weigh& weigh) const {
    const int64_t num_scores = tile.num_scores();
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = std::min(begin + kLanes, count);
      for (int64_t r = begin; r < end; ++r) {
        float* row = scores + r * kTile<Term>;
        std::fill(row, row + first, kMasked);
        std::fill(row + tile.size, row + num_scores, kMasked);
        mask(r, row, num_scores);
      }
      float shrunk[kLanes];
      add_scores<Term>(softmax + begin, end - begin, scores + begin * kTile<Term>, num_scores, softcap, shrunk, weigh);
      for (int64_t r = begin; r < end; ++r) {
        if (shrunk[r - begin] != 1) copy_scaled(acc + r * dim, acc + r * dim, shrunk[r - begin], dim);
      }
    }
  }
};

template <class T>
inline void zero_rows(T* out, int64_t count) {
  std::fill(out, out + count, T{});
}
