// Products with weights of 4 and 8 bit integers in groups.
//
// Inputs are rounded to 8 bits, with a scale for every group of a row, so that a group's sum of products is exact in 32
// bits. Groups are always added in the same order with the same roundings, so a row of the result is the same, bit by
// bit, for any other rows in the batch and any number of threads.
//
// Weights are stored in tiles of columns: words [n / 32, k * bits / 32, 32], scales and zeros [n / 32, k / group, 32].
// A product reads them in the order of memory. The codes of inputs are stored row by row and multiplied in blocks of
// rows. Where the CPU has a matrix unit (AMX), it multiplies blocks of more rows; as a group's sum is exact, the
// results are the same.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "blocks.h"
#include "dot.h"
#include "matrix_unit.h"
#include "parallel.h"
#include "recording.h"
#include "round8.h"
#include "scratch.h"
#include "terms.h"
#include "tile.h"

namespace {

constexpr int kFewRows = kLanes == 16 ? 8 : 4;    // of a block: its sums fill the registers
constexpr int kManyRows = kLanes == 16 ? 6 : 4;   // of a block of a call with kMany rows: results need registers, too
constexpr int64_t kMany = 64;                     // rows: the work per tile is small beside that per row
constexpr int64_t kUnitLeastGroup = 64;           // inputs: with fewer, adding groups would take most instructions
constexpr int kUnitLeastWords = 8;                // of the unit's 16
constexpr int kAhead = 8192;                      // bytes: how far ahead words are prefetched
constexpr double kItemNs = 6000;                  // least work of an item that another thread may take

template <class T>
struct Problem {
  const int32_t* words;
  const T* scales;
  const T* zeros;  // null: the middle of the range stands for zero
  T* out;          // [m, n]
  int64_t n, k, stride, group, groups;
  const int8_t* codes;        // [m, stride], k of each row; with 4 bits, of each eight codes even places come first
  const float* input_scales;  // [k / group, rows of the block] of each block
  const int32_t* starts;      // the same: the start value of a group's sum
  const float* input_sums;    // the same: the sum of a group's codes
};

// Rounds one row of a block of `rows`. The pointers to codes, scales and sums are those of the row's first ones.
template <class T, int Bits>
void round_row(const T* x, int64_t k, int64_t group, int64_t rows, int32_t start_per_code, int8_t* codes, float* scales,
               int32_t* starts, float* sums) {
  constexpr int kAtOnce = 16;
  for (int64_t start = 0; start < k; start += group, x += group, scales += rows, starts += rows, sums += rows) {
    Int largest = {};
    const auto look = [&](Vec v) { largest = larger(largest, magnitude_bits(v)); };
    int64_t i = 0;
    for (; i + kLanes <= group; i += kLanes) look(load(x + i));
    if (i < group) look(load(x + i, group - i));
    const Rounding rounding(largest_of(largest));
    Int total = {};
    const auto round = [&](const T* from, int64_t count) __attribute__((always_inline)) {
      uint8_t bytes[kAtOnce];
      for (int lane = 0; lane < kAtOnce; lane += kLanes) {
        const Int code = round_to_codes(load(from + lane), rounding.inverse);
        const auto narrow = __builtin_convertvector(code, Byte);
        std::memcpy(bytes + lane, &narrow, sizeof narrow);
        total += code;
      }
      if constexpr (Bits == 4) {
        // Within four codes, those at even places go to the lower half of a word and the others to the upper; then
        // words.
        for (uint8_t* b = bytes; b < bytes + kAtOnce; b += 8) {
          uint64_t v;
          std::memcpy(&v, b, sizeof v);
          v = (v & 0xff0000ffff0000ff) | (v & 0x0000ff000000ff00) << 8 | (v >> 8 & 0x0000ff000000ff00);
          v = (v & 0xffff00000000ffff) | (v & 0x00000000ffff0000) << 16 | (v >> 16 & 0x00000000ffff0000);
          std::memcpy(b, &v, sizeof v);
        }
      }
      std::memcpy(codes, bytes, count);
      codes += count;
    };
    for (i = 0; i + kAtOnce <= group; i += kAtOnce) round(x + i, kAtOnce);
    if (i < group) {
      T rest[kAtOnce] = {};
      std::memcpy(rest, x + i, (group - i) * sizeof(T));
      round(rest, group - i);
    }
    *scales = rounding.scale;
    const int32_t sum = joined(total, added);
    *starts = start_per_code * sum;
    *sums = float(sum);
  }
}

// Multiplies a block of M rows with V vectors of a tile's columns, from column `first` on. With FromMemory it
// prefetches later words of the tile; without, other rows of the call have brought them into a cache. For each group it
// also prefetches `of_group` bytes from `ahead` on.
template <class T, int Bits, int M, int V, bool HasZeros, bool FromMemory>
void part_of_tile(const Problem<T>& p, int64_t tile, int64_t row, int first, const char* ahead, int64_t of_group) {
  constexpr bool kAsksAhead = FromMemory && (Bits == 4 || M > 2);  // with few rows the CPU's own prefetcher does better
  const int64_t groups = p.groups, num_words = p.group * Bits / 32;
  const int32_t* words = p.words + tile * groups * num_words * kTile + first;
  const T* scales = p.scales + tile * groups * kTile + first;
  const T* zeros = HasZeros ? p.zeros + tile * groups * kTile + first : nullptr;
  RowTerms<Quad, M> codes(reinterpret_cast<const Quad*>(p.codes + row * p.stride), p.stride / 4);
  const float* input_scales = p.input_scales + row * groups;
  const int32_t* starts = p.starts + row * groups;
  const float* input_sums = p.input_sums + row * groups;
  const int64_t column = tile * kTile + first;
  const int64_t width = std::min<int64_t>(V * kLanes, p.n - column);
  T* const out = p.out + row * p.n + column;
  for (int m = 0; m < M; ++m) {  // else stores would wait for one cache line after the other
    for (int at = 0; at < V * kLanes; at += 64 / sizeof(T)) __builtin_prefetch(out + m * p.n + at, 1);
  }
  Vec result[M][V] = {};
  int64_t groups_left = p.groups;
  do {  // at least one group: else the compiler would write the zeros to memory
    Int sum[M][V];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) sum[m][v] = Int{} + starts[m];
    }
    for (int64_t at = 0; at < of_group; at += 64) __builtin_prefetch(ahead + at, 0, 2);
    ahead += of_group;
    const auto add_word = [&](auto& to, auto product) __attribute__((always_inline)) {
      Int w[V];
      for (int v = 0; v < V; ++v) {
        const int32_t* at = words + v * kLanes;
        w[v] = read<Int>(at);
        if (kAsksAhead && v * kLanes % 16 == 0) __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead, 0, 2);
      }
      const auto add = [&](auto weights) __attribute__((always_inline)) {
        for (int m = 0; m < M; ++m) {
          const Int x = splat_four(codes.row(m));
          for (int v = 0; v < V; ++v) to[m][v] = product(to[m][v], weights(w[v]), x);
        }
        codes.advance();
      };
      if constexpr (Bits == 8) {
        add([](Int word) { return word; });
      } else {
        add([](Int word) { return word & 0x0f0f0f0f; });
        add([](Int word) { return word >> 4 & 0x0f0f0f0f; });
      }
      words += kTile;
    };
    if constexpr (Bits == 4 && kNarrowDots > 0) {
      for (int64_t i = 0; i < num_words;) {
        Int narrow[M][V] = {};
        for (const int64_t end = std::min(i + kNarrowDots / 2, num_words); i < end; ++i) {
          add_word(narrow, narrow_dot);
        }
        for (int m = 0; m < M; ++m) {
          for (int v = 0; v < V; ++v) sum[m][v] = widened(sum[m][v], narrow[m][v]);
        }
      }
    } else {
      for (int64_t i = 0; i < num_words; ++i) add_word(sum, dot<Bits>);
    }
    Vec scale[V], zero[V];
    for (int v = 0; v < V; ++v) scale[v] = load(scales + v * kLanes);
    if constexpr (HasZeros) {
      for (int v = 0; v < V; ++v) zero[v] = load(zeros + v * kLanes);
    }
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) {
        Vec value = __builtin_convertvector(sum[m][v], Vec);
        if constexpr (HasZeros) value -= zero[v] * input_sums[m];
        result[m][v] += value * (scale[v] * input_scales[m]);
      }
    }
    scales += kTile;
    if constexpr (HasZeros) zeros += kTile;
    starts += M;
    input_scales += M;
    input_sums += M;
  } while (--groups_left > 0);
  if (width == V * kLanes) {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) store(out + m * p.n + v * kLanes, result[m][v]);
    }
  } else {
    T all[M][V * kLanes];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) store(all[m] + v * kLanes, result[m][v]);
    }
    for (int m = 0; m < M; ++m) std::memcpy(out + m * p.n, all[m], width * sizeof(T));
  }
}

template <class T, int Bits, bool HasZeros, bool FromMemory, int M>
void block_of_tile(const Problem<T>& p, int64_t tile, int64_t row, const char* ahead, int64_t asked) {
  constexpr int kVectors = M <= 2 ? std::min(kTile / kLanes, 4) : 2;  // more sums hide the latency
  constexpr int kParts = kTile / (kVectors * kLanes);
  const int64_t of_group = (asked + kParts * p.groups - 1) / (kParts * p.groups);
  for (int part = 0; part < kParts && tile * kTile + part * kVectors * kLanes < p.n; ++part) {
    part_of_tile<T, Bits, M, kVectors, HasZeros, FromMemory>(p, tile, row, part * kVectors * kLanes,
                                                             ahead + part * (asked / kParts), of_group);
  }
}

// Blocks have `Least` rows or some more. While a tile is multiplied with several blocks, the next tile is prefetched, a
// part with each block; else the first block of each tile would wait for memory.
template <class T, int Bits, bool HasZeros, bool FromMemory, int Least, int... More>
void tiles(const Problem<T>& p, const Blocks& blocks, const Share& share, const Tiles& part,
           std::integer_sequence<int, More...>) {
  static constexpr void (*kBlock[])(const Problem<T>&, int64_t, int64_t, const char*, int64_t) = {
      block_of_tile<T, Bits, HasZeros, FromMemory, Least + More>...};
  const int64_t bytes = p.k * Bits / 8 * kTile, count = share.end_block - share.first_block;
  const int64_t asked = count > 1 ? bytes / count : 0;
  for (int64_t tile = part.begin; tile < part.end; ++tile) {
    const char* ahead = reinterpret_cast<const char*>(p.words) + part.after(tile) * bytes;
    for (int64_t block = share.first_block; block < share.end_block; ++block, ahead += asked) {
      kBlock[blocks[block].rows - Least](p, tile, blocks[block].first, ahead, asked);
    }
  }
}

// Returns the number of words, of 4 inputs each, of one `add` of the matrix unit; 0 if groups are too small for it.
int unit_words([[maybe_unused]] int64_t group) {
#if defined(HAS_MATRIX_UNIT)
  for (int words = kUnitWords; group >= kUnitLeastGroup && words >= kUnitLeastWords; --words) {
    if (group % (4 * words) == 0) return words;
  }
#endif
  return 0;
}

#if defined(HAS_MATRIX_UNIT)

static_assert(kUnitLeastRows > kFewRows, "the unit's blocks are told by their rows");

// Returns the words of a tile as the unit reads them: [k / 4, kTile], four weights each, in the order of codes.
template <int Bits>
const void* unit_weights(const int32_t* words, int64_t k) {
  if constexpr (Bits == 8) return words;
  static thread_local Scratch<int32_t> unpacked;
  int32_t* to = unpacked.of(k / 4 * kTile);
  for (int64_t row = 0; row < k / 8; ++row, words += kTile, to += 2 * kTile) {
    for (int at = 0; at < kTile; at += kLanes) {
      const Int word = read<Int>(words + at), low = word & 0x0f0f0f0f, high = word >> 4 & 0x0f0f0f0f;
      std::memcpy(to + at, &low, sizeof low);
      std::memcpy(to + kTile + at, &high, sizeof high);
    }
  }
  return to - k / 4 * kTile;
}

// Multiplies a block with a tile, whose words are as `unit_weights` returns them.
template <class T, bool HasZeros>
void block_on_unit(MatrixUnit& unit, int words, const Problem<T>& p, int64_t tile, const Block& block,
                   const void* weights) {
  static_assert(kTile == kUnitColumns);
  const auto [first, rows] = block;
  const int8_t* codes = p.codes + first * p.stride;
  const char* weight = static_cast<const char*>(weights);
  alignas(64) int32_t sums[kUnitRows * kTile];
  alignas(64) float results[kUnitRows * kTile];
  std::fill_n(results, rows * kTile, 0.0f);
  for (int64_t group = 0; group < p.groups; ++group) {
    unit.begin(int(rows), words);
    for (int64_t i = 0; i < p.group; i += 4 * words, codes += 4 * words, weight += 4 * words * kTile) {
      unit.add<int8_t, uint8_t>(codes, p.stride, weight);
    }
    unit.store_sums(sums);
    const int64_t of_tile = (tile * p.groups + group) * kTile, of_block = first * p.groups + group * rows;
    for (int at = 0; at < kTile; at += kLanes) {
      const Vec scale = load(p.scales + of_tile + at), zero = HasZeros ? load(p.zeros + of_tile + at) : Vec{};
      for (int64_t m = 0; m < rows; ++m) {
        Vec value = __builtin_convertvector(read<Int>(sums + m * kTile + at) + p.starts[of_block + m], Vec);
        if constexpr (HasZeros) value -= zero * p.input_sums[of_block + m];
        float* result = results + m * kTile + at;
        store(result, load(result) + value * (scale * p.input_scales[of_block + m]));
      }
    }
  }
  for (int64_t column = tile * kTile; column < std::min((tile + 1) * kTile, p.n); column += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, p.n - column);
    for (int64_t m = 0; m < rows; ++m) {
      const Vec result = load(results + m * kTile + column - tile * kTile);
      T* const out = p.out + (first + m) * p.n + column;
      count == kLanes ? store(out, result) : store(out, result, count);
    }
  }
}

template <class T, int Bits, bool HasZeros>
void tiles_on_unit(const Problem<T>& p, const Blocks& blocks, const Share& share, const Tiles& part) {
  const int words = unit_words(p.group);
  MatrixUnit unit;
  for (int64_t tile = part.begin; tile < part.end; ++tile) {
    const void* weights = unit_weights<Bits>(p.words + tile * p.k * Bits / 32 * kTile, p.k);
    for (int64_t block = share.first_block; block < share.end_block; ++block) {
      block_on_unit<T, HasZeros>(unit, words, p, tile, blocks[block], weights);
    }
  }
}

#endif

// The rounded inputs of a call, in memory of the calling thread, which other threads read.
struct RoundedInputs {
  Scratch<int8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> starts;
  Scratch<float> sums;
  Blocks blocks;
};

template <class T, int Bits>
void gemm(const void* x, const int32_t* sources, const int32_t* starts, int64_t weights, const void* words,
          const void* scales, const void* zeros, void* out, int64_t m, int64_t n, int64_t k, int64_t group,
          int64_t threads) {
  if (m == 0 || n == 0) return;
  const int64_t groups = k / group, stride = spread_stride<int8_t>(k);
  static thread_local RoundedInputs rounded;
  int8_t* codes = rounded.codes.of(m * stride);
  float* input_scales = rounded.scales.of(m * groups);
  int32_t* sum_starts = rounded.starts.of(m * groups);
  float* input_sums = rounded.sums.of(m * groups);
  Blocks& blocks = rounded.blocks;
  const int64_t on_unit = unit_words(group) > 0 ? kUnitLeastRows : INT64_MAX;  // rows of a weight
  blocks.divide(m, starts, weights, [&](int64_t rows) {
    return rows >= on_unit ? int64_t(kUnitRows) : rows < kMany ? kFewRows : kManyRows;
  });
  parallel_ranges(blocks.count(), 65536 / (k * kFewRows) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const auto [row, rows] = blocks[block];
      const bool is_on_unit = rows > kFewRows;
      // Start values subtract the middle of the range, so that only `zeros` are left to subtract.
      const int32_t centre = is_on_unit ? 0 : kCentre<Bits>;
      const int32_t start = zeros != nullptr ? centre : centre - (1 << (Bits - 1));
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t source = sources == nullptr ? row + i : sources[row + i];
        round_row<T, Bits>(static_cast<const T*>(x) + source * k, k, group, rows, start,
                           codes + (row + i) * stride, input_scales + row * groups + i, sum_starts + row * groups + i,
                           input_sums + row * groups + i);
      }
    }
  });
  // Estimated time of a tile: its bytes at the speed of memory, its products at that of the widest vectors.
  const double tile_ns = kTile * double(k) * (Bits / 200.0 + double(m) / blocks.num_shares() / 130.0);
  blocks.for_tiles(num_tiles(n), int64_t(kItemNs / tile_ns) + 1, threads,
                   [&](const Share& share, const Tiles& part) {
    const int64_t before = share.weight * num_tiles(n) * kTile;  // columns of the weights before this one
    const T* const own_zeros = zeros == nullptr ? nullptr : static_cast<const T*>(zeros) + before * groups;
    const Problem<T> p{static_cast<const int32_t*>(words) + before * k * Bits / 32,
                       static_cast<const T*>(scales) + before * groups, own_zeros, static_cast<T*>(out), n, k, stride,
                       group, groups, codes, input_scales, sum_starts, input_sums};
    const std::make_integer_sequence<int, kFewRows> few;
    const std::make_integer_sequence<int, 2> even_sizes;  // sizes of many blocks
#if defined(HAS_MATRIX_UNIT)
    if (share.rows >= on_unit) {
      return zeros == nullptr ? tiles_on_unit<T, Bits, false>(p, blocks, share, part)
                              : tiles_on_unit<T, Bits, true>(p, blocks, share, part);
    }
#endif
    if (share.rows < kMany) {
      zeros == nullptr ? tiles<T, Bits, false, true, 1>(p, blocks, share, part, few)
                       : tiles<T, Bits, true, true, 1>(p, blocks, share, part, few);
    } else {
      zeros == nullptr ? tiles<T, Bits, false, false, kManyRows - 1>(p, blocks, share, part, even_sizes)
                       : tiles<T, Bits, true, false, kManyRows - 1>(p, blocks, share, part, even_sizes);
    }
  });
}

}  // namespace

// out [m, n] = x [m, k] times the weight that `kernels.w4a16_gemm` (bits 4) or `w8a16_gemm` describes, in tiles. dtype
// is that of x, scales, zeros (may be null) and out. `sources`, `starts` and `weights` are those of gemm_dense.
EXPORT int64_t gemm_wna16(int64_t bits, int64_t dtype, const void* x, const int32_t* sources, const int32_t* starts,
                          int64_t weights, const void* words, const void* scales, const void* zeros, void* out,
                          int64_t m, int64_t n, int64_t k, int64_t group, int64_t threads) {
  const auto run = dtype == kFloat32 ? (bits == 4 ? gemm<float, 4> : gemm<float, 8>)
                                     : (bits == 4 ? gemm<BFloat16, 4> : gemm<BFloat16, 8>);
  run(x, sources, starts, weights, words, scales, zeros, out, m, n, k, group, threads);
  return kDone;
}
RECORDABLE(gemm_wna16)
