// The matrix unit of a core, Intel's AMX, which computes sums of products of up to 32 rows and 32 columns at once.
//
// Inputs and weights are words of 4 bytes: two bfloat16 numbers, whose products are added up in float32, or four bytes,
// signed or not, whose products are added up in 32 bits. Sums of bytes are exact. Intel specifies the order of bfloat16
// sums, which differs from that of vector instructions, so all bfloat16 products of a row must use the same of the two.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "vec.h"

constexpr int kUnitRows = 32;
constexpr int kUnitColumns = 32;
constexpr int kUnitWords = 16;  // of a row and of a column, at most, in an `add`

// The least number of rows for which the unit multiplies bytes: with fewer, vector instructions are as fast.
constexpr int64_t kUnitLeastRows = 16;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_MATRIX_UNIT
inline constexpr bool kHasMatrixUnit = true;

#include <immintrin.h>

// The unit's tiles have 16 rows of 64 bytes. Their numbers are part of the instructions, and the compiler's macros take
// only literals: tiles 0 and 1 are the left and right columns of the sums of rows 0 .. 15, tiles 2 and 3 those of the
// other rows, 4 and 5 are inputs, 6 and 7 weights.
#define ADD_PRODUCTS(sums, x_tile, w_tile)                        \
  if constexpr (kMultiplies<X, W, BFloat16, BFloat16>) {          \
    _tile_dpbf16ps(sums, x_tile, w_tile);                         \
  } else if constexpr (kMultiplies<X, W, int8_t, uint8_t>) {      \
    _tile_dpbsud(sums, x_tile, w_tile);                           \
  } else {                                                        \
    static_assert(kMultiplies<X, W, uint8_t, int8_t>);            \
    _tile_dpbusd(sums, x_tile, w_tile);                           \
  }

class MatrixUnit {
 public:
  MatrixUnit() = default;
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() { _tile_release(); }

  // Sets the sums of `rows` rows to 0. Calls of `add` then multiply `words` words of each row.
  void begin(int rows, int words) {
    if (rows != rows_ || words != words_) configure(rows, words);
    _tile_zero(0);
    _tile_zero(1);
    if (rows > kHalf) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  // Adds x [rows, words] times weights [words, kUnitColumns], where rows of x are `x_stride` bytes apart and rows of
  // weights are `stride` bytes apart: columns 0 .. 15 from `left` on, the others from `right` on. X and W are the types
  // of the numbers.
  template <class X, class W>
  void add(const void* x, int64_t x_stride, const void* left, const void* right, int64_t stride) {
    finish_stores(x);
    finish_stores(left);
    finish_stores(right);
    _tile_loadd(6, left, stride);
    _tile_loadd(7, right, stride);
    _tile_loadd(4, x, x_stride);
    ADD_PRODUCTS(0, 4, 6);
    ADD_PRODUCTS(1, 4, 7);
    if (rows_ <= kHalf) return;
    _tile_loadd(5, static_cast<const char*>(x) + kHalf * x_stride, x_stride);
    ADD_PRODUCTS(2, 5, 6);
    ADD_PRODUCTS(3, 5, 7);
  }

  // The same for weights whose rows have all columns, without gaps.
  template <class X, class W>
  void add(const void* x, int64_t x_stride, const void* weights) {
    constexpr int64_t kRowBytes = 4 * kUnitColumns;
    add<X, W>(x, x_stride, weights, static_cast<const char*>(weights) + kRowBytes / 2, kRowBytes);
  }

  // to [rows, kUnitColumns] = the sums, which are float for products of bfloat16 and int32_t for those of bytes.
  template <class Sum>
  void store_sums(Sum* to) const {
    static_assert(sizeof(Sum) == 4);
    constexpr int64_t kRowBytes = kUnitColumns * sizeof(Sum);
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + kUnitColumns / 2, kRowBytes);
    if (rows_ <= kHalf) return;
    _tile_stored(2, to + kHalf * kUnitColumns, kRowBytes);
    _tile_stored(3, to + kHalf * kUnitColumns + kUnitColumns / 2, kRowBytes);
  }

 private:
  static constexpr int kHalf = kUnitRows / 2;

  template <class X, class W, class Inputs, class Weights>
  static constexpr bool kMultiplies = std::is_same_v<X, Inputs> && std::is_same_v<W, Weights>;

  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int count, int bytes) {
      rows[tile] = uint8_t(count);
      row_bytes[tile] = uint16_t(count == 0 ? 0 : bytes);
    }
  };
  static_assert(sizeof(Configuration) == 64);

  // The macros of g++ 12 do not tell the compiler what a tile or a configuration is loaded from, so it would leave out
  // stores that nothing else reads. This tells it that everything reachable from the pointer is read here.
  static void finish_stores(const void* from) { __asm__ volatile("" : : "r"(from) : "memory"); }

  void configure(int rows, int words) {
    const int upper = rows < kHalf ? rows : kHalf, lower = rows - upper;
    Configuration c;
    for (const int tile : {0, 1}) c.set(tile, upper, 64);
    for (const int tile : {2, 3}) c.set(tile, lower, 64);
    c.set(4, upper, 4 * words);
    c.set(5, lower, 4 * words);
    for (const int tile : {6, 7}) c.set(tile, words, 64);
    finish_stores(&c);
    _tile_loadconfig(&c);
    rows_ = rows;
    words_ = words;
  }

  int rows_ = 0, words_ = 0;
};

#undef ADD_PRODUCTS

#else
inline constexpr bool kHasMatrixUnit = false;
#endif
