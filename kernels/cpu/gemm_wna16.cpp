// Products with weights of 4 and 8 bit integers in groups.
//
// Inputs are rounded to 8 bits, with a scale for every group of a row, so that a group's sum of products is exact in 32
// bits. Both ways of computing it then add the groups up in the same order with the same roundings: a row of the result
// is the same, bit by bit, whatever rows are beside it and however many threads there are.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "dot.h"
#include "parallel.h"
#include "recording.h"

namespace {

constexpr int kTile = 2 * kLanes;  // columns that are computed together
constexpr int kTileRows = kDotIsOneInstruction ? 6 : 2;  // as many sums as there are registers for
constexpr int64_t kPanelBytes = 1 << 18;  // a quarter of a second-level cache, or less
constexpr int64_t kPanelTiles = 8;        // rows of memory are read so much at a time
constexpr int kFewRows = 8;               // for up to so many, weights are used as they come from memory
constexpr double kItemNs = 6000;          // work worth another thread's taking

template <class T>
struct Problem {
  const int32_t* words;  // [k * bits / 32, n]
  const T* scales;       // [k / group, n]
  const T* zeros;        // the same, or null: the middle of the range is zero
  T* out;                // [m, n]
  int64_t m, n, k, group;
  const int8_t* codes;  // [m, k], inputs; for 4 bits those at odd places follow the four at even ones
  const float* input_scales;  // [m, k / group]
  const int32_t* input_sums;  // [m, k / group], of codes
};

template <class T, int Bits>
void round_row(const T* x, int64_t k, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
  constexpr int kBlock = 32 / Bits;
  for (int64_t start = 0; start < k; start += group, x += group, codes += group) {
    Vec largest = {}, poison = {};  // 0, or NaN if an input is not finite
    auto look = [&](Vec v) {
      largest = max(largest, max(v, -v));
      poison += v * 0.0f;
    };
    int64_t i = 0;
    for (; i + kLanes <= group; i += kLanes) look(load(x + i));
    if (i < group) look(load(x + i, group - i));
    float bound = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) bound = std::max(bound, largest[lane]);
    const float inverse = bound > 1e-30f ? 127.0f / bound : 0.0f;
    Int total = {};
    auto round = [&](Vec v, int8_t* to, int64_t count) {
      const Int code = bit_cast<Int>(v * inverse + 12582912.0f) - 0x4B400000;  // the integer lands in the low bits
      const auto bytes = __builtin_convertvector(code, Byte);
      total += code;
      std::memcpy(to, &bytes, count);
    };
    for (i = 0; i + kLanes <= group; i += kLanes) round(load(x + i), codes + i, kLanes);
    if (i < group) round(load(x + i, group - i), codes + i, group - i);
    *scales++ = bound / 127.0f + sum(poison);
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    *sums++ = sum;
    if constexpr (Bits == 4) {
      for (i = 0; i < group; i += kBlock) {
        const int8_t* c = codes + i;
        const int8_t parted[kBlock] = {c[0], c[2], c[4], c[6], c[1], c[3], c[5], c[7]};
        std::memcpy(codes + i, parted, kBlock);
      }
    }
  }
}

inline Int load_words(const int32_t* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Int four(const int8_t* codes) {
  int32_t v;
  std::memcpy(&v, codes, 4);
  return Int{} + v;
}

// Where the sum of a group starts, so that no zero point is left to subtract except those of `zeros`.
template <int Bits>
inline Int start_of(bool has_zeros, int32_t input_sum) {
  return Int{} + (has_zeros ? kCentre<Bits> : kCentre<Bits> - (1 << (Bits - 1))) * input_sum;
}

// What a group adds to the result.
template <class T>
inline Vec add_group(Vec result, Int sum, const T* scales, const T* zeros, float input_scale, int32_t input_sum) {
  Vec value = __builtin_convertvector(sum, Vec);
  if (zeros != nullptr) value -= load(zeros) * float(input_sum);
  return result + value * (load(scales) * input_scale);
}

// Columns from..to-1, a multiple of kLanes, for all of at most kFewRows rows: every word is read once, a strip of
// columns at a time along the rows of memory. M is m, or a little more: then the last row is computed again.
template <class T, int Bits, int M>
void few_rows(const Problem<T>& p, int64_t from, int64_t to) {
  constexpr int kStrip = 1024 / M / kLanes * kLanes;
  constexpr int kWords = Bits;  // 32 inputs at a time
  constexpr int kInputs = 32 / Bits;
  alignas(64) int32_t sums[M][kStrip];
  alignas(64) float results[M][kStrip];
  const int64_t groups = p.k / p.group, rows = p.group / kInputs;
  for (int64_t start = from; start < to; start += kStrip) {
    const int64_t width = std::min<int64_t>(kStrip, to - start);
    std::memset(results, 0, sizeof results);
    for (int64_t g = 0; g < groups; ++g) {
      const T* scales = p.scales + g * p.n + start;
      const T* zeros = p.zeros == nullptr ? nullptr : p.zeros + g * p.n + start;
      int64_t at[M];
      for (int m = 0; m < M; ++m) at[m] = std::min<int64_t>(m, p.m - 1) * groups + g;
      for (int64_t r = 0; r < rows; r += kWords) {
        const int32_t* words = p.words + (g * rows + r) * p.n + start;
        const int8_t* codes[M];
        for (int m = 0; m < M; ++m) codes[m] = p.codes + at[m] * p.group + r * kInputs;
        auto strip = [&](auto count) __attribute__((always_inline)) {
          for (int64_t column = 0; column < width; column += kLanes) {
            Int sum[M];
            for (int m = 0; m < M; ++m) {
              sum[m] = r == 0 ? start_of<Bits>(zeros != nullptr, p.input_sums[at[m]]) : load_words(sums[m] + column);
            }
            for (int i = 0; i < count; ++i) {
              if constexpr (M > 4) __builtin_prefetch(words + (i + kWords) * p.n + column);  // they compute long enough
              const Int w = load_words(words + i * p.n + column);
              if constexpr (Bits == 8) {
                for (int m = 0; m < M; ++m) sum[m] = dot<8>(sum[m], w, four(codes[m] + 4 * i));
              } else {
                const Int even = w & 0x0f0f0f0f, odd = w >> 4 & 0x0f0f0f0f;
                for (int m = 0; m < M; ++m) sum[m] = dot<4>(sum[m], even, four(codes[m] + 8 * i));
                for (int m = 0; m < M; ++m) sum[m] = dot<4>(sum[m], odd, four(codes[m] + 8 * i + 4));
              }
            }
            for (int m = 0; m < M; ++m) {
              if (r + kWords < rows) {
                std::memcpy(sums[m] + column, &sum[m], sizeof sum[m]);
              } else {
                store(results[m] + column,
                      add_group(load(results[m] + column), sum[m], scales + column,
                                zeros == nullptr ? nullptr : zeros + column, p.input_scales[at[m]],
                                p.input_sums[at[m]]));
              }
            }
          }
        };
        if (rows - r >= kWords) {
          strip(std::integral_constant<int, kWords>());
        } else {
          strip(int(rows - r));
        }
      }
    }
    for (int m = 0; m < p.m; ++m) {
      for (int64_t j = 0; j < width; j += kLanes) store(p.out + m * p.n + start + j, load(results[m] + j));
    }
  }
}

// Columns of a weight unpacked to bytes, a tile after the other: words [k / 4, kTile], scales and zeros
// [k / group, kTile].
template <class T>
struct Panel {
  std::vector<int32_t> words;
  std::vector<T> scales, zeros;
};

template <class T, int Bits>
void unpack(const Problem<T>& p, int64_t from, int64_t to, Panel<T>& panel) {
  constexpr int kParts = 8 / Bits;  // words with a byte per number that a word gives
  const int64_t groups = p.k / p.group, tiles = (to - from + kTile - 1) / kTile;
  panel.words.resize(tiles * p.k / 4 * kTile);
  panel.scales.resize(tiles * groups * kTile);
  panel.zeros.resize(p.zeros == nullptr ? 0 : tiles * groups * kTile);
  for (int64_t r = 0; r < p.k * Bits / 32; ++r) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = from + tile * kTile, width = std::min<int64_t>(kTile, to - column);
      const int32_t* word = p.words + r * p.n + column;
      int32_t* bytes = panel.words.data() + (tile * p.k / 4 + r * kParts) * kTile;
      if constexpr (Bits == 8) {
        std::memcpy(bytes, word, width * sizeof *word);
      } else if (width == kTile) {
        for (int j = 0; j < kTile; ++j) bytes[j] = word[j] & 0x0f0f0f0f;
        for (int j = 0; j < kTile; ++j) bytes[j + kTile] = word[j] >> 4 & 0x0f0f0f0f;
      } else {
        for (int64_t j = 0; j < width; ++j) bytes[j] = word[j] & 0x0f0f0f0f;
        for (int64_t j = 0; j < width; ++j) bytes[j + kTile] = word[j] >> 4 & 0x0f0f0f0f;
      }
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t column = from + tile * kTile, width = std::min<int64_t>(kTile, to - column);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (tile * groups + g) * kTile;
      std::memcpy(panel.scales.data() + at, p.scales + g * p.n + column, width * sizeof(T));
      if (p.zeros != nullptr) std::memcpy(panel.zeros.data() + at, p.zeros + g * p.n + column, width * sizeof(T));
    }
  }
}

template <class T, int Bits, int M>
void tile_of_rows(const Problem<T>& p, const Panel<T>& panel, int64_t tile, int64_t row, T* out, int64_t width) {
  const int64_t groups = p.k / p.group;
  const int32_t* words = panel.words.data() + tile * p.k / 4 * kTile;
  const T* scales = panel.scales.data() + tile * groups * kTile;
  const T* zeros = p.zeros == nullptr ? nullptr : panel.zeros.data() + tile * groups * kTile;
  const int8_t* codes = p.codes + row * p.k;
  Vec result[M][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = row * groups + g;
    Int sum[M][2];
    for (int m = 0; m < M; ++m) {
      sum[m][0] = sum[m][1] = start_of<Bits>(zeros != nullptr, p.input_sums[at + m * groups]);
    }
    for (int64_t i = 0; i < p.group; i += 4, codes += 4, words += kTile) {
      const Int left = load_words(words), right = load_words(words + kLanes);
      for (int m = 0; m < M; ++m) {
        const Int x = four(codes + m * p.k);
        sum[m][0] = dot<Bits>(sum[m][0], left, x);
        sum[m][1] = dot<Bits>(sum[m][1], right, x);
      }
    }
    for (int side = 0; side < 2; ++side) {
      const int64_t column = g * kTile + side * kLanes;
      for (int m = 0; m < M; ++m) {
        result[m][side] = add_group(result[m][side], sum[m][side], scales + column,
                                    zeros == nullptr ? nullptr : zeros + column, p.input_scales[at + m * groups],
                                    p.input_sums[at + m * groups]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    T both[kTile];
    T* to = width == kTile ? out + m * p.n : both;
    store(to, result[m][0]);
    store(to + kLanes, result[m][1]);
    if (width < kTile) std::memcpy(out + m * p.n, both, width * sizeof(T));
  }
}

template <class T, int Bits>
void many_rows(const Problem<T>& p, int64_t from, int64_t to) {
  static thread_local Panel<T> own;
  Panel<T>& panel = own;  // which thread's it is, is found out once
  const int64_t width_of_panel = std::clamp<int64_t>(kPanelBytes / (p.k * kTile), 1, kPanelTiles) * kTile;
  for (int64_t start = from; start < to; start += width_of_panel) {
    const int64_t end = std::min(start + width_of_panel, to);
    unpack<T, Bits>(p, start, end, panel);
    for (int64_t column = start; column < end; column += kTile) {
      const int64_t tile = (column - start) / kTile, width = std::min<int64_t>(kTile, end - column);
      int64_t row = 0;
      auto rows_by = [&](auto count) __attribute__((always_inline)) {
        for (; row + count <= p.m; row += count) {
          tile_of_rows<T, Bits, count>(p, panel, tile, row, p.out + row * p.n + column, width);
        }
      };
      rows_by(std::integral_constant<int, kTileRows>());
      if constexpr (kTileRows > 3) rows_by(std::integral_constant<int, 3>());
      rows_by(std::integral_constant<int, 1>());
    }
  }
}

template <class T, int Bits>
void columns(const Problem<T>& p, int64_t from, int64_t to) {
  static constexpr void (*kFew[])(const Problem<T>&, int64_t, int64_t) = {
      few_rows<T, Bits, 1>, few_rows<T, Bits, 2>, few_rows<T, Bits, 4>, few_rows<T, Bits, 4>,
      few_rows<T, Bits, 6>, few_rows<T, Bits, 6>, few_rows<T, Bits, 8>, few_rows<T, Bits, 8>};
  const int64_t whole = p.m <= kFewRows ? from + (to - from) / kLanes * kLanes : from;
  if (whole > from) kFew[p.m - 1](p, from, whole);
  if (whole < to) many_rows<T, Bits>(p, whole, to);
}

// Memory that is kept from one call to the next: new memory for each would have to be zeroed by the system.
template <class T>
class Scratch {
 public:
  // Returns room for so many, whose values are not said.
  T* of(int64_t count) {
    if (count > count_) {
      data_.reset();
      data_.reset(new T[count]);
      count_ = count;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t count_ = 0;
};

// What the inputs of a call become. It is the calling thread's, whoever helps it.
struct RoundedInputs {
  Scratch<int8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> sums;
};

template <class T, int Bits>
void gemm(const void* x, const void* words, const void* scales, const void* zeros, void* out, int64_t m, int64_t n,
          int64_t k, int64_t group, int64_t threads) {
  if (m == 0) return;
  const int64_t groups = k / group;
  static thread_local RoundedInputs rounded;
  int8_t* codes = rounded.codes.of(m * k);
  float* input_scales = rounded.scales.of(m * groups);
  int32_t* input_sums = rounded.sums.of(m * groups);
  parallel_ranges(m, 65536 / k + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      round_row<T, Bits>(static_cast<const T*>(x) + row * k, k, group, codes + row * k,
                         input_scales + row * groups, input_sums + row * groups);
    }
  });
  const Problem<T> p{static_cast<const int32_t*>(words), static_cast<const T*>(scales), static_cast<const T*>(zeros),
                     static_cast<T*>(out), m, n, k, group, codes, input_scales, input_sums};
  // Bytes at the speed of memory and products at that of the widest vectors: a guess of what a column takes.
  const double column_ns = double(k) * (Bits / 200.0 + m / 130.0);
  int64_t parts = std::clamp<int64_t>(int64_t(column_ns * n / kItemNs), 1, 4 * threads);
  if (parts > threads) parts -= parts % threads;  // as many for each
  const int64_t each = ((n + parts - 1) / parts + kTile - 1) / kTile * kTile;
  parallel_ranges(n, each, threads, [&](int64_t begin, int64_t end) { columns<T, Bits>(p, begin, end); });
}

}  // namespace

// out [m, n] = x [m, k] times the weight that `kernels.w4a16_gemm` (bits 4) or `w8a16_gemm` describes; dtype is that of
// x, scales, zeros (may be null) and out.
EXPORT int64_t gemm_wna16(int64_t bits, int64_t dtype, const void* x, const void* words, const void* scales,
                          const void* zeros, void* out, int64_t m, int64_t n, int64_t k, int64_t group,
                          int64_t threads) {
  const auto run = dtype == kFloat32 ? (bits == 4 ? gemm<float, 4> : gemm<float, 8>)
                                     : (bits == 4 ? gemm<BFloat16, 4> : gemm<BFloat16, 8>);
  run(x, words, scales, zeros, out, m, n, k, group, threads);
  return kDone;
}
RECORDABLE(gemm_wna16)
