// The paged cache and what both attention ops do with a tile of its tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

// Tokens that are attended to before the running maximum is renewed. Their keys and values stay in the core's cache.
constexpr int64_t kTile = 64;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Keys and values, each [num_blocks, page, heads, dim], and which blocks sequences have: [S, max_blocks], rows apart.
template <class T>
struct PagedCache {
  const T *k, *v;
  const int32_t* block_table;
  int64_t max_blocks, table_stride, num_blocks, page, heads, dim;
};

// Where the keys and values of up to kTile consecutive tokens are. What is left over points at the last token, which is
// live: what may stand in other slots is never read.
template <class T>
struct Tile {
  const T* k[kTile];
  const T* v[kTile];
  int64_t size;  // tokens

  // False when the table names a block that is not there.
  bool find(const PagedCache<T>& cache, int64_t sequence, int64_t head, int64_t begin, int64_t end) {
    size = std::min(end - begin, kTile);
    const int32_t* blocks = cache.block_table + sequence * cache.table_stride;
    int64_t block = begin / cache.page, offset = begin % cache.page, at = 0;
    while (at < size) {
      if (block >= cache.max_blocks || blocks[block] < 0 || blocks[block] >= cache.num_blocks) return false;
      const int64_t first = (int64_t(blocks[block]) * cache.page + offset) * cache.heads + head;
      const int64_t count = std::min(cache.page - offset, size - at), stride = cache.heads * cache.dim;
      for (int64_t i = 0; i < count; ++i, ++at) {
        k[at] = cache.k + first * cache.dim + i * stride;
        v[at] = cache.v + first * cache.dim + i * stride;
      }
      offset = 0;
      ++block;
    }
    for (; at < kTile; ++at) k[at] = k[size - 1], v[at] = v[size - 1];
    return true;
  }

  // Ask for keys and values of all heads of tokens begin .. end of a tile that was found for head 0.
  void prefetch(const PagedCache<T>& cache, int64_t begin, int64_t end) const {
    const int64_t bytes = cache.heads * cache.dim * sizeof(T);
    for (const auto& rows : {k, v}) {
      for (int64_t t = begin; t < end; ++t) {
        const char* row = reinterpret_cast<const char*>(rows[t]);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
      }
    }
  }

  void next_head(int64_t dim) {
    for (int64_t t = 0; t < kTile; ++t) k[t] += dim, v[t] += dim;
  }
};

// The softmax of a row of scores so far: largest score, sum of weights.
struct Softmax {
  float largest = kMasked;
  float total = 0;

  // Turns scores [kTile] into weights relative to the largest one and returns what weights so far are multiplied by.
  float add(float* scores, float softcap) {
    if (softcap != 0) {
      for (int64_t i = 0; i < kTile; i += kLanes) {
        const Vec s = load(scores + i);
        store(scores + i, s == kMasked ? s : tanh(s / softcap) * softcap);
      }
    }
    Vec most = load(scores);
    for (int64_t i = kLanes; i < kTile; i += kLanes) most = max(load(scores + i), most);
    const float before = largest;
    largest = std::max(before, maximum(most));
    if (largest == kMasked) {  // nothing was seen yet
      std::fill(scores, scores + kTile, 0.0f);
      return 1;
    }
    Vec weights = {};
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const Vec weight = exp(load(scores + i) - largest);
      weights += weight;
      store(scores + i, weight);
    }
    const float shrunk = before == largest ? 1.0f : std::exp(before - largest);
    total = total * shrunk + sum(weights);
    return shrunk;
  }
};

// c [kRows, kVecs vectors] += a [kRows, inner] * b, of which row i starts at b(i).
template <int kRows, int kVecs, class B>
inline void multiply_block(const float* a, int64_t a_stride, int64_t inner, const B& b, float* c, int64_t c_stride) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) acc[r][n] = load(c + r * c_stride + n * kLanes);
  }
  for (int64_t i = 0; i < inner; ++i) {
    const auto* row = b(i);
    Vec columns[kVecs];
    for (int n = 0; n < kVecs; ++n) columns[n] = load(row + n * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float factor = a[r * a_stride + i];
      for (int n = 0; n < kVecs; ++n) acc[r][n] += columns[n] * factor;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) store(c + r * c_stride + n * kLanes, acc[r][n]);
  }
}

// As many accumulators as the registers hold.
constexpr int kBlockRows = kLanes == 16 ? 6 : 4;
constexpr int kBlockVecs = kLanes == 16 ? 4 : 2;

template <int kVecs, class B>
inline void multiply_rows(const float* a, int64_t a_stride, int64_t rows, int64_t inner, const B& b, float* c,
                          int64_t c_stride) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    multiply_block<kBlockRows, kVecs>(a + r * a_stride, a_stride, inner, b, c + r * c_stride, c_stride);
  }
  a += r * a_stride, c += r * c_stride;
  switch (rows - r) {
    case 1: return multiply_block<1, kVecs>(a, a_stride, inner, b, c, c_stride);
    case 2: return multiply_block<2, kVecs>(a, a_stride, inner, b, c, c_stride);
    case 3: return multiply_block<3, kVecs>(a, a_stride, inner, b, c, c_stride);
    case 4: return multiply_block<4, kVecs>(a, a_stride, inner, b, c, c_stride);
    case 5: return multiply_block<5, kVecs>(a, a_stride, inner, b, c, c_stride);
  }
}

// c [rows, columns] += a [rows, inner] * b; `columns` is a multiple of kLanes, row i of b starts at b(i).
template <class B>
inline void multiply(const float* a, int64_t a_stride, int64_t rows, int64_t inner, const B& b, float* c,
                     int64_t c_stride, int64_t columns) {
  int64_t at = 0;
  const auto from = [&](int64_t i) { return b(i) + at; };
  for (; at + kBlockVecs * kLanes <= columns; at += kBlockVecs * kLanes) {
    multiply_rows<kBlockVecs>(a, a_stride, rows, inner, from, c + at, c_stride);
  }
  for (; at < columns; at += kLanes) multiply_rows<1>(a, a_stride, rows, inner, from, c + at, c_stride);
}

// acc [rows, dim] = acc * shrunk + weights [rows, kTile] * v.
template <class T>
inline void add_values(const float* weights, int64_t rows, const Tile<T>& tile, float* acc, int64_t dim) {
  multiply(weights, kTile, rows, tile.size, [&](int64_t i) { return tile.v[i]; }, acc, dim, dim);
}

inline void scale_row(float* row, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) store(row + d, load(row + d) * factor);
}

// to [dim] = from * factor, in the type of `to`.
template <class From, class To>
inline void copy_scaled(const From* from, To* to, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(from + d) * factor);
}

template <class T>
inline void zero_rows(T* out, int64_t count) {
  std::fill(out, out + count, T{});
}
