// The matrix unit of a core, Intel's AMX: sums of products of up to 32 rows and 32 columns at once.
//
// Inputs and weights are words of 4 bytes: two numbers of bfloat16, whose products are added up in float32, or four
// bytes, those of inputs signed and those of weights not, whose products are added up in 32 bits. In which order the
// unit adds up the products of an `add` is its affair: it is the same for every row.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

constexpr int kUnitRows = 32;
constexpr int kUnitColumns = 32;
constexpr int kUnitWords = 16;  // of a row and of a column, at most, in an `add`

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_MATRIX_UNIT

#include <immintrin.h>

// `Sum` is float for words of bfloat16 and int32_t for words of bytes. The numbers of its tiles, which have 16 rows of
// 64 bytes, are part of the instructions, and the compiler's macros take nothing but literals: sums of rows 0 .. 15 are
// in 0 and 1, the left and the right columns, those of other rows in 2 and 3, inputs in 4 and 5, weights in 6 and 7.
template <class Sum>
class MatrixUnit {
 public:
  MatrixUnit() = default;
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() { _tile_release(); }

  // Makes the sums of `rows` rows 0. Calls of `add` then take `words` words.
  void begin(int rows, int words) {
    if (rows != rows_ || words != words_) configure(rows, words);
    _tile_zero(0);
    _tile_zero(1);
    if (rows > kHalf) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  // x [rows, words], rows being `stride` bytes apart, times weights [words, kUnitColumns], which are not apart.
  void add(const void* x, int64_t stride, const void* weights) {
    constexpr int64_t kRowBytes = 4 * kUnitColumns;
    finish_stores(x);
    finish_stores(weights);
    _tile_loadd(6, weights, kRowBytes);
    _tile_loadd(7, static_cast<const char*>(weights) + kRowBytes / 2, kRowBytes);
    _tile_loadd(4, x, stride);
    if constexpr (std::is_same_v<Sum, float>) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    }
    if (rows_ <= kHalf) return;
    _tile_loadd(5, static_cast<const char*>(x) + kHalf * stride, stride);
    if constexpr (std::is_same_v<Sum, float>) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }

  // to [rows, kUnitColumns] = the sums.
  void store_sums(Sum* to) const {
    constexpr int64_t kRowBytes = kUnitColumns * sizeof(Sum);
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + kUnitColumns / 2, kRowBytes);
    if (rows_ <= kHalf) return;
    _tile_stored(2, to + kHalf * kUnitColumns, kRowBytes);
    _tile_stored(3, to + kHalf * kUnitColumns + kUnitColumns / 2, kRowBytes);
  }

 private:
  static constexpr int kHalf = kUnitRows / 2;
  static_assert(sizeof(Sum) == 4);

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

#endif
