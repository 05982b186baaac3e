// Products of small matrices whose parts are anywhere in memory, for attention.
#pragma once

#include <algorithm>
#include <type_traits>

#include "terms.h"

// c [kRows, kVecs vectors] = a [kRows, inner] * b, where `inner` counts terms. b has rows of terms, or for each term as
// many rows of numbers as it holds; vector n of row i is at b[n] + i * b_stride. With kAdd the product is added to c.
// With kAsk, the same offsets from `ahead` are prefetched, spread over the loop, because a burst of prefetches would
// stall the products.
template <int kRows, int kVecs, bool kAdd, bool kAsk, class Term, class B>
inline void multiply_block(const Term* a, int64_t a_stride, int64_t inner, const B* const (&b)[kVecs],
                           const B* const (&ahead)[kVecs], int64_t b_stride, float* c, int64_t c_stride) {
  constexpr int kRowsOfTerm = std::is_same_v<B, Term> ? 1 : kNumbers<Term>;
  constexpr int kPerLine = std::min<int>(kVecs, 64 / (kLanes * sizeof(B)));  // vectors
  constexpr int kPhases = std::max(1, kPerLine / kRowsOfTerm);
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) acc[r][n] = kAdd ? load(c + r * c_stride + n * kLanes) : Vec{};
  }
  const auto step = [&](int64_t i, int phase) __attribute__((always_inline)) {
    const int64_t row = i * kRowsOfTerm * b_stride;
    decltype(load_terms<Term>(b[0], b_stride)) columns[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      columns[n] = load_terms<Term>(b[n] + row, b_stride);
      for (int part = 0; kAsk && part < kRowsOfTerm; ++part) {
        if ((n + phase * kRowsOfTerm + part) % kPerLine == 0) {
          __builtin_prefetch(ahead[n] + row + part * b_stride, 0, 2);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kVecs; ++n) acc[r][n] = add_product(acc[r][n], columns[n], a + r * a_stride + i);
    }
  };
  int64_t i = 0;
  for (; i + kPhases <= inner; i += kPhases) {
    for (int phase = 0; phase < kPhases; ++phase) step(i + phase, phase);
  }
  for (; i < inner; ++i) step(i, 0);
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) store(c + r * c_stride + n * kLanes, acc[r][n]);
  }
}

// The block size: as many accumulators as the registers hold.
constexpr int kBlockRows = kLanes == 16 ? 6 : 4;
constexpr int kBlockVecs = kLanes == 16 ? 4 : 2;

// Calls block(count, row) for blocks of rows 0 .. rows - 1, where `count` is a compile-time constant.
template <class Block>
inline void by_blocks(int64_t rows, const Block& block) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) block(std::integral_constant<int, kBlockRows>(), r);
  switch (rows - r) {
    case 1: return block(std::integral_constant<int, 1>(), r);
    case 2: return block(std::integral_constant<int, 2>(), r);
    case 3: return block(std::integral_constant<int, 3>(), r);
    case 4: return block(std::integral_constant<int, 4>(), r);
    case 5: return block(std::integral_constant<int, 5>(), r);
  }
}

// Not inlined, because it is large and has many callers.
template <int kVecs, bool kAdd, bool kAsk, class Term, class B>
__attribute__((noinline)) void multiply_rows(const Term* a, int64_t a_stride, int64_t rows, int64_t inner,
                                             const B* const (&b)[kVecs], const B* const (&ahead)[kVecs],
                                             int64_t b_stride, float* c, int64_t c_stride) {
  by_blocks(rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
    multiply_block<count, kVecs, kAdd, kAsk>(a + r * a_stride, a_stride, inner, b, ahead, b_stride, c + r * c_stride,
                                             c_stride);
  });
}

// c [rows, columns] = a [rows, inner] * b; with kAdd the product is added to c. `columns` is a multiple of kLanes. In
// b's first row, the columns from `at` on start at b(at), in the next row b_stride further. The order of the additions
// does not depend on the number of rows.
template <bool kAdd, bool kAsk, class Term, class Columns, class Ahead>
inline void multiply(const Term* a, int64_t a_stride, int64_t rows, int64_t inner, const Columns& b,
                     const Ahead& ahead, int64_t b_stride, float* c, int64_t c_stride, int64_t columns) {
  using B = std::remove_reference_t<decltype(*b(0))>;
  int64_t at = 0;
  for (; at + kBlockVecs * kLanes <= columns; at += kBlockVecs * kLanes) {
    B *from[kBlockVecs], *then[kBlockVecs];
    for (int n = 0; n < kBlockVecs; ++n) from[n] = b(at + n * kLanes), then[n] = ahead(at + n * kLanes);
    multiply_rows<kBlockVecs, kAdd, kAsk>(a, a_stride, rows, inner, from, then, b_stride, c + at, c_stride);
  }
  for (; at < columns; at += kLanes) {
    B *from[1] = {b(at)}, *then[1] = {ahead(at)};
    multiply_rows<1, kAdd, kAsk>(a, a_stride, rows, inner, from, then, b_stride, c + at, c_stride);
  }
}
